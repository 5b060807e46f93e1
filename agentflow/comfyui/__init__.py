"""ComfyUI: what is rendered (graphs, workflows, requests and their pre-flight), and the servers that do it."""
