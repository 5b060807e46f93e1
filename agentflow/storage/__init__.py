"""Where files live: `contract` is what every store can do, `objects` disks and S3, `supabase` Supabase Storage."""

from agentflow.storage.contract import NotStored, Storage, StorageError, Stored, TooLarge, Writer

__all__ = ["NotStored", "Storage", "StorageError", "Stored", "TooLarge", "Writer"]
