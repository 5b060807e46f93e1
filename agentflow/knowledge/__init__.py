"""The knowledge base of an organization: documents, what is found in them, and the graph of who and what they speak of."""
