"""The knowledge base: documents, their chunks, vectors and graph."""
