"""The gateway's HTTP server in the actor's event loop: one port and one Unix socket, a key for each episode.

Owns listening, keys, and how an error is told. What is asked is the dialects' (`chat_completions.py`, `responses.py`),
what is answered the session's. Never learns of a task.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from actors import metrics
from actors.engine import Engine
from actors.gateway import chat_completions, responses
from actors.gateway.chat_format import Interpreter
from actors.gateway.conversation import Answer
from actors.gateway.episode import run_self_driven
from actors.gateway.errors import ApiError
from actors.gateway.fields import Fields
from actors.gateway.session import Session
from actors.gateway.transport import dump, read_json, reply, stream
from actors.gateway.voices import Voice
from actors.renderer import Renderer
from actors.rollout import NO_BUDGETS, InfraFailureError
from actors.thinking import Thinking
from broker.process.lifecycle import ErgonError
from broker.process.security import is_loopback
from broker.process.settings import GatewaySection
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.trajectory import Ticket, Trajectory
from envs.interface import Endpoint, Environment, ReferencePolicy, Reward

logger = logging.getLogger(__name__)

MODEL = "policy"
SHUTDOWN_S = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """One per actor process; belongs to one event loop. `start` it before the first session, `close` it always."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        settings: GatewaySection,
        thinking: ThinkingSection = NO_BUDGETS,
        *,
        port: int,
        max_model_len: int,
    ) -> None:
        """thinking: the run's rules for budgets. port: to listen on, 0 for any free one. max_model_len: tokens the
        engine takes, prompt and reply together."""
        self._engine = engine
        self._renderer = renderer
        self._settings = settings
        self._interpreter = Interpreter(renderer.chat_format, Thinking(thinking, renderer))
        self._port = port
        self._max_model_len = max_model_len
        self._sessions: dict[bytes, Session] = {}  # by the hash of their key
        self._reports: dict[bytes, Session] = {}
        self._runner: web.AppRunner | None = None
        self._directory: Path | None = None

    async def start(self) -> None:
        """Listen. Raises ErgonError where the address cannot be had or may not be open."""
        settings = self._settings
        if not settings.allow_unencrypted and not is_loopback(f"tcp://{settings.host}:{self._port}"):
            raise ErgonError(
                f'gateway.host = "{settings.host}" is no loopback address, and programs speak plain HTTP; name one '
                "such as 127.0.0.1, or set gateway.allow_unencrypted = true on a network of your own"
            )
        app = web.Application(client_max_size=settings.max_body_mb << 20, middlewares=[self._told_errors])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/responses", self._responses)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/reward", self._reward)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        # Its name cannot be guessed, and only its socket is in it: a sandbox gets in under an id of its own.
        self._directory = Path(tempfile.mkdtemp(prefix="ergon-gateway-"))
        self._directory.chmod(0o711)
        try:
            site = web.TCPSite(self._runner, settings.host, self._port)
            await site.start()
            await web.UnixSite(self._runner, str(self.socket)).start()
        except OSError as error:
            await self.close()
            raise ErgonError(
                f"gateway.port = {self._port} on {settings.host} cannot be had ({error.strerror}); choose another one"
            ) from error
        self.socket.chmod(0o666)
        self._port = self._runner.addresses[0][1]
        logger.info("gateway listens url=%s socket=%s", self.url, self.socket)

    @property
    def socket(self) -> Path:
        """The Unix socket that serves the same as the port."""
        assert self._directory is not None
        return self._directory / "socket"

    @property
    def url(self) -> str:
        """The base URL for programs on this machine."""
        host = self._settings.host
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"http://{host}:{self._port}/v1"

    def open(self, ticket: Ticket, reference: ReferencePolicy | None, max_turns: int | None = None) -> Session:
        """Let an episode's calls in; the reference policy answers them where there is one, the engine otherwise.
        max_turns: the environment's bound beside the ticket's, None for none."""
        ends = (self._renderer, self._interpreter)
        voice = Voice(ticket, self._engine, *ends, self._max_model_len, reference)
        session = Session(ticket, voice, *ends, self._settings, self._max_model_len, max_turns)
        self._sessions[_hash(session.key)] = session
        self._reports[_hash(session.report_key)] = session
        return session

    async def shut(self, session: Session) -> None:
        """Let no more calls of this episode in, and cut those that run."""
        self._sessions.pop(_hash(session.key), None)
        self._reports.pop(_hash(session.report_key), None)
        await session.end()

    def endpoint(self, session: Session, deadline: float) -> Endpoint:
        """What the episode's environment needs to know."""
        return Endpoint(
            self.url,
            session.key,
            str(self.socket),
            self._settings.model_names[0] if self._settings.model_names else MODEL,
            deadline,
            f"{self.url}/reward",
            session.report_key,
            session.reports,
        )

    async def run_episode(self, ticket: Ticket, environment: Environment, actor_id: str) -> Trajectory:
        """See episode.run_self_driven."""
        return await run_self_driven(self, ticket, environment, actor_id)

    async def close(self) -> None:
        """Stop listening and end what is open. Idempotent."""
        for session in list(self._sessions.values()):
            await self.shut(session)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request, self._sessions)
        with session.admitted():
            question, form = chat_completions.read_request(await read_json(request))
            self._check_model(form.model)
            answer = await session.answer(question)
        decode, fingerprint = self._renderer.decode, _fingerprint(answer)
        if not form.stream:
            return reply(chat_completions.completion(answer, form, decode, fingerprint), answer)
        chunks = chat_completions.chunks(answer, form, decode, fingerprint)
        return await stream(request, [*(f"data: {dump(chunk)}\n\n" for chunk in chunks), "data: [DONE]\n\n"], answer)

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request, self._sessions)
        with session.admitted():
            question, form = responses.read_request(await read_json(request), session.threads)
            self._check_model(form.model)
            answer = await session.answer(question)
        response_id = responses.new_id()
        if form.store:
            session.threads[response_id] = (*form.said, answer.replies[0].message)
        sampling = {"temperature": session.ticket.sampling.temperature, "top_p": session.ticket.sampling.top_p}
        finished = responses.response(answer, form, response_id, sampling, self._renderer.decode)
        if not form.stream:
            return reply(finished, answer)
        events = responses.events(finished, form, sampling)
        lines = [f"event: {event['type']}\ndata: {dump(event)}\n\n" for event in events]
        return await stream(request, lines, answer)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._session(request, self._sessions)
        names = self._settings.model_names or (MODEL,)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "ergon"} for name in names]
        return reply({"object": "list", "data": models})

    async def _reward(self, request: web.Request) -> web.StreamResponse:
        """What a trusted program says of itself: {"reward": 1.0, "components": {"name": 1.0}}."""
        session = self._session(request, self._reports)
        fields = Fields(await read_json(request))
        total = fields.number("reward", float("-inf"), float("inf"))
        if total is None:
            raise fields.wrong("reward", "a number")
        components = fields.raw("components") or {}
        if not isinstance(components, dict):
            raise fields.wrong("components", "an object of numbers")
        named = Fields(components, "components")
        found = {name: named.number(name, float("-inf"), float("inf")) for name in components}
        fields.finish()
        session.reports.append(Reward(total, {name: value for name, value in found.items() if value is not None}))
        return reply({"object": "reward", "reward": total})

    def _check_model(self, name: str) -> None:
        names = self._settings.model_names
        if names and name not in names:
            raise ApiError(
                404,
                f"the model {name!r:.80} does not exist here; there is {', '.join(names)} (gateway.model_names)",
                param="model",
                code="model_not_found",
            )

    @staticmethod
    def _session(request: web.Request, sessions: dict[bytes, Session]) -> Session:
        session = sessions.get(_hash(_key(request)))
        if session is None:
            raise ApiError(
                401,
                "the API key is not one of a running episode; use the OPENAI_API_KEY of the program's environment",
                code="invalid_api_key",
                kind="authentication_error",
            )
        return session

    @web.middleware
    async def _told_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in OpenAI's shape; counts all requests."""
        route = request.match_info.route.resource
        try:
            response = await handler(request)
        except ApiError as error:
            response = self._told(request, error)
        except web.HTTPRequestEntityTooLarge:
            most = self._settings.max_body_mb
            response = self._told(
                request, ApiError(413, f"the request is larger than gateway.max_body_mb = {most} MiB")
            )
        except web.HTTPException as error:
            there = "POST /v1/chat/completions, POST /v1/responses and GET /v1/models"
            message = f"{request.method} {request.path:.80} is not served; there are {there}"
            response = self._told(request, ApiError(error.status, message, code="unknown_url"))
        except Exception as error:
            # Ours, not the program's: the episode must not be judged by it.
            logger.exception("gateway failed path=%s", request.path)
            if (session := self._sessions.get(_hash(_key(request)))) is not None:
                session.fail(InfraFailureError(f"gateway: {type(error).__name__}: {error}", "gateway"))
            response = self._told(request, ApiError(500, "the gateway failed; the episode is void"))
        metrics.gateway_requests.labels(route.canonical if route else "unknown", str(response.status)).inc()
        return response

    def _told(self, request: web.Request, error: ApiError) -> web.Response:
        metrics.gateway_refused.labels(error.code or str(error.status)).inc()
        session = self._sessions.get(_hash(_key(request)))
        if session is not None and not session.was_refused:  # once for an episode, whose program may try for ever
            session.was_refused = True
            logger.warning("call refused ticket=%s reason=%s", session.ticket.ticket_id, error.message)
        return web.json_response(error.body(), status=error.status)


def _fingerprint(answer: Answer) -> str:
    """The newest version among those that sampled the answer."""
    versions = [run[:2] for reply in answer.replies for run in reply.turn.version_runs]
    return "ergon-{}.{}".format(*max(versions, default=(0, 0)))


def _key(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _hash(key: str) -> bytes:
    """Keys are looked up by their hash, so that the time a look-up takes says nothing about them."""
    return hashlib.sha256(key.encode(errors="replace")).digest()
