"""What one rank of `launch/serve.py` runs: it loads its part of the model, and serves it."""

import socket

from dist_lab.comm.agree import together
from dist_lab.errors import MachineError
from dist_lab.inference.engine import Engine
from dist_lab.inference.line import Line
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.serving import serve
from dist_lab.inference.stage import load_stage
from dist_lab.inference.weights import tokenizer_of
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.generate.command import open_weights
from dist_lab.programs.generate.memory import check_blocks
from dist_lab.programs.serve.settings import BLOCK, Serve

SEQUENCES, BUDGET = 64, 256  # that run at once, and tokens of a step


def serve_model(config: Serve, mesh: Mesh) -> int:
    """Serve the model until the router says stop. Returns 0."""
    weights, _ = open_weights(config.checkpoint, mesh)
    with together(mesh.world):
        tokenizer = tokenizer_of(weights)
        tokenizer.encode("a")  # it reads its file now, and not when the first text comes
        check_blocks(weights, mesh, config.blocks, BLOCK)
    stage = load_stage(weights, mesh)
    row = POLICIES[config.policy]
    keeps = row.prefix_cache if config.prefix_cache is None else config.prefix_cache
    policy = row.build(SEQUENCES, BUDGET)
    engine = Engine(stage, tokenizer, policy, config.blocks, BLOCK, keeps)
    line = connect(config.line) if mesh.rank == 0 else None
    serve(engine, mesh.world, line, beat=min(1.0, config.timeout / 4))
    return 0


def connect(path: str) -> Line:
    """The line to the router. Raises MachineError if it has ended."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        raise MachineError(f"the router has ended: {error.strerror}") from error
    return Line(connection)
