"""The knowledge base: documents as chunks of text, their vectors, and the search over both."""
