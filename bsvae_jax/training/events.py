"""TensorBoard's events, written by the thread that has them, so that what goes wrong is known at once and to the caller.

tensorboardX's own writers hand events to a thread, which dies of a full disk with a traceback and never says so.
"""

import errno
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class EventFile:
    """A new event file; TensorBoard reads all files of a folder as one, in the order of their names."""

    def __init__(self, folder: Path, first_step: int):
        """Makes the file, and `folder` if absent. Of earlier files, TensorBoard drops what is of `first_step` or later.

        Raises:
          OSError: it cannot be written; there is no file then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        # Later in that order than every file there, wherever the clock stands.
        stamp = max([time.time_ns(), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])
        self._path = folder / f"events.out.tfevents.{stamp}.{os.getpid()}"
        self._file = self._path.open("wb", buffering=0)
        try:
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            self._path.unlink(missing_ok=True)
            raise

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step under their names.

        Raises:
          OSError: they cannot be written; the file holds what was written before, and may be tried again.
        """
        named = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=named)))

    def _write(self, event: Event) -> None:
        """A record of the TFRecord format: length, its checksum, content, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        record = length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
        start = self._file.tell()
        if self._file.write(record) != len(record):
            self._file.seek(start)
            self._file.truncate()  # TensorBoard reads nothing beyond a torn record
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()
