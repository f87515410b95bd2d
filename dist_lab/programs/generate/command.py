"""What one rank of `launch/generate.py` runs."""

import sys
import time
from pathlib import Path

from dist_lab.checkpoint.exchange import gptq_files
from dist_lab.checkpoint.exchange.huggingface import CONFIG, open_folder
from dist_lab.checkpoint.load import open_newest
from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.data.custom import is_custom
from dist_lab.errors import MachineError, UserError, printable, shown
from dist_lab.inference.generate import generate as generate_texts
from dist_lab.inference.quantized import OfQuantizedFolder
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import Stage, load_stage
from dist_lab.inference.text import Tokenizer
from dist_lab.inference.weights import OfFolder, Weights, of_run, tokenizer_of
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.run_dir import CHECKPOINTS
from dist_lab.programs.cli.saved_settings import checked_settings
from dist_lab.programs.generate.memory import check_memory
from dist_lab.programs.generate.settings import Generate


def generate(config: Generate, mesh: Mesh) -> int:
    """Continue the prompt, and write the text to stdout on rank 0. Returns 0."""
    check_settings_agree(config.to_dict(), mesh.world)
    weights, longest = open_weights(config.checkpoint, mesh)
    with together(mesh.world):
        tokenizer = tokenizer_of(weights)
        prompt = read_prompt(config, weights, tokenizer, mesh)
    stage = load_stage(weights, mesh)
    if mesh.rank == 0 and longest and len(prompt) + config.tokens > longest:
        tell(
            f"note: the text may grow to {len(prompt) + config.tokens} tokens, and the model was "
            f"trained on {longest}; at later positions it may write worse"
        )
    request = Request(prompt, config.tokens, sampling_of(config), [config.stop] * bool(config.stop))
    run(stage, request, tokenizer)
    return 0


def run(stage: Stage, request: Request, tokenizer: Tokenizer) -> None:
    """Generate and show the text, and then how fast that was."""
    times = [time.perf_counter()]
    shows = stage.mesh.rank == 0

    def on_text(number: int, text: str) -> None:
        times.append(time.perf_counter())
        if shows and text:
            show(text)

    generate_texts(stage, [request], tokenizer, on_text)
    if shows:
        if sys.stdout.isatty():
            show("\n")
        tell(speed(len(request.prompt), times))


def speed(prompt: int, times: list[float]) -> str:
    """The line about the time: of the prompt and the first token, and of all tokens after it.

    >>> speed(4, [0.0, 0.5, 0.6, 0.7])
    '3 tokens: the first after 500 ms, for a prompt of 4, then 10.0 tokens/s'
    """
    count, first = len(times) - 1, times[1] - times[0]
    line = f"{count} tokens: the first after {1000 * first:.0f} ms, for a prompt of {prompt}"
    return (
        f"{line}, then {(count - 1) / (times[-1] - times[1]):.1f} tokens/s" if count > 1 else line
    )


def show(text: str) -> None:
    """Write text to stdout now. A terminal gets no control characters but line breaks and tabs."""
    if sys.stdout.isatty():
        text = printable(text, keep="\n\t")
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise MachineError("stdout was closed, so nobody reads the text; keep it open") from None


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_weights(path: str, mesh: Mesh) -> tuple[Weights, int]:
    """The model at `path`, and the longest text that it was trained on, 0 if unknown. Collective.

    Raises:
        UserError: there is no model of text.
        MachineError: it is damaged.
    """
    folder = Path(path).expanduser()
    if gptq_files.is_quantized(folder):
        with together(mesh.world):
            opened = gptq_files.open_folder(folder)
            if mesh.rank == 0:
                opened.check_hashes()
            return OfQuantizedFolder(opened), 0
    if (folder / CONFIG).is_file():
        with together(mesh.world):
            return OfFolder(open_folder(folder)), 0
    inner = folder / CHECKPOINTS
    source = inner if inner.is_dir() else folder
    checkpoint = open_newest(source, mesh, tell)
    with together(mesh.world):
        settings = checked_settings(checkpoint.manifest["settings"] or {}, checkpoint.folder)
        weights = of_run(checkpoint, settings)
        if is_custom(data := str(settings.get("data"))) and checkpoint.tokenizer is None:
            raise UserError(
                f"checkpoint {str(checkpoint.folder)!r} is of the tokens of {shown(data)}, which "
                "are no bytes of a text; call inference.generate with its tokenizer"
            )
    for name, what in (("qat", "weights"), ("recipe", "operands")):
        if mesh.rank == 0 and (value := settings.get(name)):
            tell(
                f"note: the run rounds {what} in its forward ({name} {value}), and the text is "
                "that of the weights as they are saved, not rounded"
            )
    return weights, settings.get("seq", 0)


def read_prompt(config: Generate, weights: Weights, tokenizer: Tokenizer, mesh: Mesh) -> list[int]:
    """The tokens of the prompt. Raises UserError if its keys and values do not fit in memory."""
    file = Path(config.prompt_file).expanduser()
    size = file.stat().st_size if config.prompt_file else len(config.prompt.encode())
    check_memory(weights, mesh, size, config.tokens)  # a token is a byte or more
    try:
        text = file.read_text(encoding="utf-8") if config.prompt_file else config.prompt
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} of {shown(config.prompt_file)} is no UTF-8 (--prompt-file); give "
            "a text file"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {shown(config.prompt_file)}: {error.strerror} (--prompt-file)"
        ) from None
    return tokenizer.encode(text)


def sampling_of(config: Generate) -> Sampling:
    if not config.samples:
        return Sampling()
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature, config.top_k, top_p, config.seed or 0)
