"""Effects that every layer shares: files written whole or not at all, room on the disk, downloads."""
