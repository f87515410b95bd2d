"""What a rank refuses before the server counts as ready."""

import json
import re

import pytest
import short_run

from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.programs.serve import worker
from dist_lab.programs.serve.settings import Serve


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return short_run.trained(tmp_path_factory.getbasetemp())


def refused(rank, checkpoint, blocks, tokenizer):
    """The line with which a rank refuses to serve.

    Args:
        tokenizer: a tokenizer.json in place of the model's bytes; None: bytes.
    """
    config = Serve(checkpoint=str(checkpoint), blocks=blocks)
    with pytest.MonkeyPatch.context() as patch:
        if tokenizer:
            patch.setattr(worker, "tokenizer_of", lambda _: FileTokenizer(tokenizer, "its file"))
        with pytest.raises((UserError, MachineError)) as error:
            worker.serve_model(config, init_mesh(tp=1))
    return str(error.value)


def test_more_blocks_than_memory_are_refused_in_the_words_of_the_flag(trained, on_ranks):
    (line,) = on_ranks(1, refused, trained, 10**9, None)
    assert "a cache of 1,000,000,000 blocks of 16 tokens" in line
    assert re.search(r"free; give --blocks \d+ or less$", line)


def test_a_tokenizer_that_the_library_cannot_use_is_refused_before_the_first_text(
    trained, on_ranks
):
    table = {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}}
    (line,) = on_ranks(1, refused, trained, 10, json.dumps(table))  # it has no merges
    assert line.startswith("the library tokenizers cannot read its file: ")
