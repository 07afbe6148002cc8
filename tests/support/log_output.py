"""A log's output that a test reads back."""

import json
import os

from observability.line_writer import LineWriter


class Output:
    """A pipe whose reader is the test; `lines` closes the writer and reads everything."""

    def __init__(self, queued_lines=10_000, blocking=True):
        self.reader, self.descriptor = os.pipe()
        os.set_blocking(self.descriptor, blocking)
        self.writer = LineWriter(self.descriptor, queued_lines=queued_lines)

    def lines(self):
        """May hold 64 KiB: a pipe's worth."""
        self.writer.close()
        os.close(self.descriptor)
        with open(self.reader, "rb", closefd=False) as file:
            return file.read().splitlines()

    def records(self):
        return [json.loads(line) for line in self.lines()]
