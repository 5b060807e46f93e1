"""The one client for language models: OpenRouter, and every server that speaks the same protocol (Ollama, llama.cpp, vLLM).

    answer = context.system.models.chat(context, [Message("user", "What is in this picture?", (picture,))])

Pictures and sound travel as bytes: no address that a user gave is handed to a vendor, who would fetch it from inside of
somebody's network or tell it what we look at.
"""

from agentflow.models.client import Caller, Models
from agentflow.models.content import Completion, Image, Message, Segment, Transcription, Word
from agentflow.models.endpoints import NotConfigured

__all__ = [
    "Caller",
    "Completion",
    "Image",
    "Message",
    "Models",
    "NotConfigured",
    "Segment",
    "Transcription",
    "Word",
]
