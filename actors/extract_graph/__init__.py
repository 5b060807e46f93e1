"""The graph of a document: `job` is the worker's side, `reading` asks for facts, `grounding` finds them in the text, `resolution`
says which names mean the same."""
