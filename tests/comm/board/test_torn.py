"""A fingerprint that is read while it is written is not taken for another one."""

from dist_lab.comm.board import lanes as module
from dist_lab.comm.board.lanes import PRINT, Lanes
from dist_lab.comm.board.page import PAGE, Page


def test_a_slot_that_is_filled_between_two_reads_is_read_again(monkeypatch):
    page = Page(bytearray(PAGE), 0)
    lanes = Lanes(page)
    at = lanes.make(b"group---", [0, 1]) + 1 * module.FINGERPRINT
    reads = []

    class Late:
        """Reads the hash, and only then the count, of a slot that is filled in between."""

        @staticmethod
        def unpack_from(memory, offset):
            number, hash_, count = PRINT.unpack_from(memory, offset)
            reads.append(count)
            if len(reads) == 1:
                PRINT.pack_into(memory, offset, 7, b"h" * 16, 1)
                return number, hash_, 1
            return number, hash_, count

    monkeypatch.setattr(module, "PRINT", Late)
    assert lanes.print_at(b"group---", 1) == (7, b"h" * 16, 1)
    assert len(reads) == 2
    assert PRINT.unpack_from(page.memory, at) == (7, b"h" * 16, 1)
