"""The paths of the server.

    POST /v1/completions         continue a text
    POST /v1/chat/completions    answer a chat
    GET  /v1/models              the one model
    GET  /health                 200 if the ranks answer, else 503
    GET  /metrics                for Prometheus
    GET  /                       a page to talk to the model

See https://platform.openai.com/docs/api-reference for the format of requests and answers.
"""

import random
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dist_lab.programs.serve import metrics
from dist_lab.programs.serve.chat import STOPS, prompt_of
from dist_lab.programs.serve.receive import check_host, read_body
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.respond import CHAT, COMPLETION, Answer, Style, error_response
from dist_lab.programs.serve.router import Asked, Router
from dist_lab.programs.serve.schema import ChatRequest, Common, CompletionRequest, parse

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build(router: Router, model: str, patience: float, hosts: Collection[str]) -> ASGIApp:
    """Returns the ASGI application.

    Args:
        model: its name.
        patience: seconds without a word of rank 0 after which the server counts as ill.
        hosts: requests must have one of these names in the header Host; if empty, any.
    """
    started = int(time.time())
    answers: Counter[tuple[str, int]] = Counter()

    async def completions(request: Request) -> Answer:
        asked = parse(await read_body(request), CompletionRequest, model)
        texts = [asked.of(prompt, drawn_seed()) for prompt in asked.prompts]
        return answer(asked, texts, COMPLETION)

    async def chat(request: Request) -> Answer:
        asked = parse(await read_body(request), ChatRequest, model)
        texts = asked.of(prompt_of(asked.messages), drawn_seed(), STOPS)
        return answer(asked, [texts], CHAT)

    def answer(asked: Common, texts: Sequence[Asked], style: Style) -> Answer:
        opened = router.open(texts)
        return Answer(opened, style, model, bool(asked.stream), asked.include_usage)

    async def models(request: Request) -> Response:
        about = {"id": model, "object": "model", "created": started, "owned_by": "dist_lab"}
        return JSONResponse({"object": "list", "data": [about]})

    async def health(request: Request) -> Response:
        silent = time.monotonic() - router.heard
        words = {"loading": not router.ready.done(), "stopping": router.ending.is_set(),
                 "silent": silent > patience}  # fmt: skip
        status = next((word for word, holds in words.items() if holds), "ok")
        about = {"status": status, "seconds_since_last_step": round(silent, 3)}
        return JSONResponse(about, 200 if status == "ok" else 503)

    async def measured(request: Request) -> Response:
        return PlainTextResponse(metrics.metrics(router, answers), media_type=metrics.TYPE)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in ("index.html", "page.css", "page.js"):
            raise HTTPException(404)
        headers = {
            "content-security-policy": POLICY, "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer", "cache-control": "no-cache",
        }  # fmt: skip
        return FileResponse(PAGE / name, headers=headers)

    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", measured),
            Route("/", page),
            Route("/{name}", page),
        ],
        exception_handlers={Refused: refused, HTTPException: no_such_path},
    )
    return Counted(app, answers, {route.path for route in app.routes}, hosts)  # type: ignore[attr-defined]


def drawn_seed() -> int:
    return random.getrandbits(31)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_response(error)


async def no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(
        Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


class Counted:
    """Counts the answers of an application, and keeps the wrong hosts away from it."""

    def __init__(
        self, app: ASGIApp, answers: Counter[tuple[str, int]], paths: set[str],
        hosts: Collection[str],
    ) -> None:  # fmt: skip
        self.app, self.answers, self.paths, self.hosts = app, answers, paths, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[path, message["status"]] += 1
            await send(message)

        try:
            if self.hosts:
                check_host(Request(scope).headers.get("host", ""), self.hosts)
        except Refused as error:
            await error_response(error)(scope, receive, counted_send)
            return
        await self.app(scope, receive, counted_send)
