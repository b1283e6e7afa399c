"""The routes of the page, thin: each reads a question, lets a thread answer it, and writes the answer.

Model passes run in one thread, one after the other. A question whose page went away is not computed any more.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from picolm.errors import PicoError
from picolm.trusted import parse_json
from picolm.view.animation import Animation, animate
from picolm.view.batches import MOST_ROWS, batch
from picolm.view.follow import Feed
from picolm.view.guard import BODY_BYTES, body_of, failure
from picolm.view.pages import TYPES, page_files
from picolm.view.refusal import Refused, status_of
from picolm.view.replaying import Replays, plan
from picolm.view.saved import Save, page, wanted
from picolm.view.session import Number, Question, Session, layer_of, line_of, text_of, to_json
from picolm.view.training import training

ANIMATION_BYTES = 64 * 2**20
MOST_WAITING = 64  # questions for the models
Form = TypeVar("Form", bound=BaseModel)
Result = TypeVar("Result")
Handler = Callable[[Request], Awaitable[Response]]


async def read_form(request: Request, form: type[Form], most_bytes: int = BODY_BYTES) -> Form:
    """Return the body of a request in a form. Raises Refused: 400 or 413."""
    content = await body_of(request, most_bytes)
    try:
        found = parse_json(content, "the request", form)
    except PicoError as error:
        raise Refused(str(error)) from error
    return form.model_validate(found)


class Worker:
    """The thread that runs the models. waiting: how many questions it has."""

    def __init__(self) -> None:
        self._pool, self.waiting = ThreadPoolExecutor(1, "models"), 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns. One that is cancelled before its turn is not run. Raises Refused where too many wait."""
        if self.waiting >= MOST_WAITING:
            raise Refused("too many questions wait for the model; ask again in a moment", 503)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self.waiting -= 1


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return what `work` gives; cancel it when the page does not wait for it any more. Raises ClientDisconnect then."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asked, gone = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ClientDisconnect
        return asked.result()
    finally:
        asked.cancel()
        gone.cancel()


class Routes:
    """The answers to requests, of one session."""

    def __init__(self, session: Session):
        self.session, self.worker, self.feed = session, Worker(), Feed(session.runs)
        self.replays = Replays(self.feed.publish)
        self.stopping = threading.Event()

    def stop(self) -> None:
        """End all streams, so that the server can end; also from another thread, or a signal."""
        self.stopping.set()
        self.feed.close()
        self.replays.close()

    async def page(self, request: Request) -> Response:
        return page_file("index.html")

    async def page_part(self, request: Request) -> Response:
        return page_file(request.path_params["name"])

    async def describe(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.session.describe))

    async def _answer(self, request: Request, kind: str, question: Question) -> tuple[Any, Any, bytes]:
        """Return the run and the text of a question, and the answer."""
        viewed, asked = await asyncio.to_thread(self.session.read, question)
        kept = await asyncio.to_thread(self.session.kept, kind, viewed, question.step, asked.ids)
        if kept is None:
            work = partial(self.session.answer, kind, viewed, question.step, asked.ids)
            kept = await until_gone(request, self.worker.run(work))
        return viewed, asked, kept

    async def text(self, request: Request) -> Response:
        question = await read_form(request, Question)
        viewed, asked, found = await self._answer(request, "text", question)
        return json_response(to_json(text_of(asked, viewed, question.step, found)))

    async def layers(self, request: Request) -> Response:
        return json_response((await self._answer(request, "layers", await read_form(request, Question)))[2])

    async def heads(self, request: Request) -> Response:
        question = await read_form(request, Question)
        _, _, found = await self._answer(request, "heads", question)
        content = found if question.layer is None else layer_of(found, question.layer)
        return Response(content, media_type="application/octet-stream")

    async def history(self, request: Request) -> Response:
        return await self._stream(request, "text")

    async def head_scores(self, request: Request) -> Response:
        return await self._stream(request, "head-scores")

    async def _stream(self, request: Request, kind: str) -> Response:
        """Answer with a line for each step. What is wrong with the question itself is told by the status."""
        question = await read_form(request, Question)
        viewed, asked = await asyncio.to_thread(self.session.read, question)
        steps = await asyncio.to_thread(self.session.steps, question)

        async def lines() -> AsyncIterator[bytes]:
            for step in steps:
                if self.stopping.is_set():
                    return
                try:
                    kept = await asyncio.to_thread(self.session.kept, kind, viewed, step, asked.ids)
                    if kept is None:
                        kept = await self.worker.run(partial(self.session.answer, kind, viewed, step, asked.ids))
                    line = line_of(kind, step, kept)
                except PicoError as error:
                    line = {"step": step, "error": str(error)}
                yield to_json(line) + b"\n"

        return Aborting(lines(), media_type="application/x-ndjson")

    async def training(self, request: Request) -> Response:
        viewed = self.session.run(run_number(request))
        found = await asyncio.to_thread(training, viewed.run, self.session.analyses)
        return json_response(to_json(found))

    async def batch(self, request: Request) -> Response:
        question = await read_form(request, BatchQuestion)
        viewed = self.session.run(question.run)
        work = partial(batch, self.session, viewed, question.step, question.rows)
        return json_response(await until_gone(request, self.worker.run(work)))

    async def save(self, request: Request) -> Response:
        asked = await read_form(request, Save)
        viewed, read = await asyncio.to_thread(self.session.read, asked)
        kinds = await asyncio.to_thread(wanted, self.session, asked)

        async def collect() -> str:
            answer = partial(self.session.answer, viewed=viewed, ids=read.ids)
            found = {(kind, step): await self.worker.run(partial(answer, kind, step=step)) for kind, step in kinds}
            return await asyncio.to_thread(page, self.session, asked, found)

        content = (await until_gone(request, collect())).encode(errors="replace")
        return Response(
            content, media_type="text/html", headers={"content-disposition": 'attachment; filename="pico.html"'}
        )

    async def animation(self, request: Request) -> Response:
        asked = await read_form(request, Animation, ANIMATION_BYTES)
        return Response(await asyncio.to_thread(animate, asked), media_type=f"image/{asked.format}")

    async def replay_plan(self, request: Request) -> Response:
        step = request.query_params.get("step", "")
        if not step.isdecimal() or len(step) > 15:
            raise Refused("step should be the number of a step")
        return JSONResponse(await asyncio.to_thread(plan, self.session.run(run_number(request)), int(step)))

    async def replay(self, request: Request) -> Response:
        question = await read_form(request, ReplayQuestion)
        viewed = self.session.run(question.run)
        planned = await asyncio.to_thread(plan, viewed, question.step)
        self.replays.start(viewed, question.step, planned)
        return JSONResponse(planned, 202)

    async def events(self, request: Request) -> Response:
        return Aborting(self.feed.listen(), media_type="text/event-stream")


class ReplayQuestion(BaseModel, extra="forbid"):
    """Which step of which run."""

    run: Number
    step: Number


class BatchQuestion(ReplayQuestion):
    """How many rows of the batch of which step."""

    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)] = MOST_ROWS


class Aborting(StreamingResponse):
    """A stream that ends when the page goes away, also while the next line is computed."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        writing, watching = asyncio.ensure_future(self.stream_response(send)), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            writing.cancel()
            with suppress(asyncio.CancelledError, OSError, ClientDisconnect):
                await writing


def run_number(request: Request) -> int:
    """Return the run that the address names. Raises Refused."""
    text = request.query_params.get("run", "0")
    if not text.isdecimal() or len(text) > 6:
        raise Refused("run should be the number of a run")
    return int(text)


def json_response(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def page_file(name: str) -> Response:
    """Return a file of the page. Raises Refused for another name."""
    if name not in page_files():
        raise Refused("the page has no such file", 404)
    kind = TYPES.get(name[name.rfind(".") :], "application/octet-stream")
    return Response(page_files()[name], media_type=kind, headers={"cache-control": "no-cache"})


def answered(handler: Handler) -> Handler:
    """Return a handler whose errors are answers: a sentence, and a status of its own."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except PicoError as error:
            return failure(error, status_of(error))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            return failure(Refused(f"{type(error).__name__}: {error}"), 500)

    return answer


def application(session: Session) -> Starlette:
    """Return the application of a session, without its guard."""
    routes = Routes(session)
    get: dict[str, Handler] = {
        "/": routes.page, "/page/{name}": routes.page_part, "/api/session": routes.describe,
        "/api/training": routes.training, "/api/replay": routes.replay_plan, "/api/events": routes.events,
    }  # fmt: skip
    post: dict[str, Handler] = {
        "/api/text": routes.text, "/api/history": routes.history, "/api/heads": routes.heads, "/api/layers": routes.layers,
        "/api/head-scores": routes.head_scores, "/api/batch": routes.batch, "/api/replay": routes.replay,
        "/api/save": routes.save, "/api/animation": routes.animation,
    }  # fmt: skip
    paths = [Route(path, answered(handler), methods=["GET"]) for path, handler in get.items()]
    app = Starlette(
        routes=[*paths, *(Route(path, answered(handler), methods=["POST"]) for path, handler in post.items())]
    )
    app.state.routes = routes
    return app
