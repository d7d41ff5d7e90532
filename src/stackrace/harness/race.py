"""Runs one point: engine up, load on, captures parsed and kept as they come, verdict at the end."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stackrace.backends.garage import Garage
from stackrace.backends.running import Engine
from stackrace.harness import host
from stackrace.harness import records as table
from stackrace.harness.calibrate import calibration
from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import EngineError, LoadGeneratorDied, PointFailed, StackraceError
from stackrace.harness.load.generator import LoadGenerator
from stackrace.harness.load.health import Health
from stackrace.harness.load.messages import Cold, Finished, Job, Message, RoundDone, Started, Tick
from stackrace.harness.point import Point
from stackrace.harness.provenance import provenance
from stackrace.harness.pulse import Pulse
from stackrace.harness.secrets import public, without_secret_words, without_secrets
from stackrace.harness.standing import Standing
from stackrace.harness.store import RunWriter
from stackrace.harness.summary import steadiness, summarize
from stackrace.harness.telemetry import samples
from stackrace.harness.telemetry.sampler import Sampler
from stackrace.harness.telemetry.sources import sources
from stackrace.harness.types import Endpoint, Request
from stackrace.harness.validity import judge
from stackrace.harness.verify.checks import Checks
from stackrace.harness.warmup import WarmUp

_REFRESH = 0.25
_LAST_WORDS = 5 * SECOND

Watch = Callable[[Standing], None]


def race(point: Point, garage: Garage, checks: Checks, watch: Watch) -> dict[str, Any]:
    """Run a point and return its run.json.

    Raises PointFailed, after the folder says why, if it ended without a result; KeyboardInterrupt likewise.
    """
    host.pin(point.cores.engine)  # parsing and the display must not disturb the load generator
    writer = RunWriter(point.folder)
    run = _Run(point, writer, watch)
    try:
        writer.begin(public(point.config), _meta(point))
    except OSError as e:
        writer.release()
        raise PointFailed(f"cannot write {point.folder}: {e}") from e
    try:
        run.go(garage, checks)
        return run.end("ok")
    except KeyboardInterrupt:
        run.end_somehow("interrupted", "interrupted: the same command runs this point again")
        raise
    except (StackraceError, OSError) as e:
        message = str(e) if isinstance(e, StackraceError) else f"{type(e).__name__}: {e}"
        run.end_somehow("failed", message)
        raise PointFailed(f"{point.folder.name} ({point.backend.name}): {message}") from e
    except Exception as e:  # a fault of ours: the folder says so, and the traceback is worth seeing
        run.end_somehow("failed", f"{type(e).__name__}: {e}")
        raise


class _Run:
    def __init__(self, point: Point, writer: RunWriter, watch: Watch) -> None:
        self._point = point
        self._writer = writer
        self._watch = watch
        self._began = now()
        self._standing = Standing(total=len(point.due))
        self._requests: tuple[Request, ...] = ()
        self._sessions = 0
        self._endpoint: Endpoint | None = None
        self._warmup: WarmUp | None = None
        self._pulse: Pulse | None = None
        self._health: list[Health] = []
        self._stamped = 0
        self._sampler: Sampler | None = None
        self._telemetry = samples.empty()
        self._log: Path | None = None
        self._log_from = 0

    def go(self, garage: Garage, checks: Checks) -> None:
        self._watch(self._standing)
        schedule = self._point.schedule()
        schedule.save(self._point.folder / "schedule.parquet")
        self._requests, self._sessions = schedule.requests, len(schedule.sessions)
        engine = self._verified(garage, checks) if self._point.config.get("verify") else self._launch(garage)
        try:
            self._race(engine)
        except EngineError:  # whatever is left of it must not be asked by the next point
            garage.close()
            raise

    def _race(self, engine: Engine) -> None:
        self._standing.phase = "warming up"
        self._warmup = WarmUp(self._point, self._requests, engine)
        self._sampler = self._sample(engine)
        self._pulse = Pulse(engine, self._point.workers, self._point.config["timeouts"]["stall"])
        with LoadGenerator(self._job(engine), self._warmup.next_round) as generator:
            try:
                self._listen(generator)
            except BaseException:
                self._take_the_rest(generator)
                raise
        self._pulse.check_at_the_end()

    def end(self, status: str, error: str | None = None) -> dict[str, Any]:
        """Write verdict and summary; returns run.json."""
        self._keep_log()
        self._keep_telemetry()
        config = self._point.config
        frame = table.frame(self._writer.rows)
        fields: dict[str, Any] = {"seconds": (now() - self._began) / SECOND}
        if error is not None:
            fields["error"] = error
        if len(frame):
            fields["summary"] = summary = summarize(frame, config["slo"], self._telemetry)
            fields["steady"] = steadiness(frame)
            fields["validity"] = judge(frame, summary, config, self._writer.meta).as_dict()
        return self._writer.end(status, **fields)

    def end_somehow(self, status: str, error: str) -> None:
        """Like `end`; if even that fails (a full disk, a fault of ours), the journal stays and the folder is freed."""
        try:
            self.end(status, error)
        except Exception:
            self._writer.end_barely(status, error)

    def _verified(self, garage: Garage, checks: Checks) -> Engine:
        """Launch, and find out whether it computes what the weights say."""
        exam = checks.exam(self._point.backend, self._point.config)
        if exam is not None:
            self._say("judging what is right")
            checks.judge(exam, self._point.cores.engine, garage.close)
            self._say("starting engine")
        engine = self._launch(garage)
        self._say("checking equivalence")
        self._writer.update(equivalence=checks.verdict(exam, engine).as_dict())
        return engine

    def _say(self, phase: str) -> None:
        self._standing.phase = phase
        self._watch(self._standing)

    def _launch(self, garage: Garage) -> Engine:
        point = self._point
        folder = point.sweep_folder / "engines" / f"{point.backend.name}-{point.fingerprint}"
        self._log = folder / "server.log"
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        if point.backend.fingerprint() != point.fingerprint:
            raise EngineError("the engine's code changed after this sweep was planned: run the same command again")
        engine = garage.engine(point.backend, folder, point.cores.engine, point.launch)
        self._endpoint = engine.endpoint
        self._writer.update(
            backend={
                "command": without_secret_words(engine.command),
                "environment": without_secrets(point.backend.environment()),
                "version": point.version,
                "fingerprint": point.fingerprint,
            }
        )
        return engine

    def _job(self, engine: Engine) -> Job:
        point, config = self._point, self._point.config
        return Job(
            endpoint=engine.endpoint,
            schedule=point.folder / "schedule.parquet",
            sessions=self._sessions,
            concurrency=config["concurrency"],
            seconds=config["stop"]["seconds"],
            drain=config["stop"]["drain"],
            connect_timeout=config["timeouts"]["connect"],
            request_timeout=config["timeouts"]["request"],
            stall_timeout=config["timeouts"]["stall"],
            workers=point.workers,
            cores=point.cores.load_generator,
            parser_cores=point.cores.engine,
        )

    def _listen(self, generator: LoadGenerator) -> None:
        assert self._pulse is not None
        for message in generator.messages(_REFRESH):
            self._hear(message)
            if message is None or isinstance(message, Tick):
                self._pulse.check(message)
                self._standing.in_flight = self._pulse.in_flight
            self._watch(self._standing)
        if self._sampler is not None:
            self._sampler.stop()
        if len(self._health) < self._point.workers:
            raise LoadGeneratorDied("the load generator ended before the race was over")

    def _hear(self, message: Message | None) -> None:
        standing = self._standing
        if isinstance(message, Finished):
            self._keep(message)
        elif isinstance(message, Started) and standing.start is None:
            assert self._warmup is not None
            standing.phase, standing.start = "racing", message.start
            if self._sampler is not None:
                self._sampler.sample()
            started = datetime.now(UTC).isoformat()
            self._writer.update(started_at=started, start_ns=message.start, warmup=self._warmup.as_dict())
        elif isinstance(message, Cold | RoundDone):
            assert self._warmup is not None
            standing.phase = f"warming up, round {len(self._warmup.rounds) + 1}"
        elif isinstance(message, Health):
            self._health.append(message)
            stamps = "kernel" if self._stamped == self._standing.done else "user" if not self._stamped else "mixed"
            workers = [h._asdict() for h in sorted(self._health)]
            self._writer.update(load_generator={"workers": workers, "stamps": stamps})

    def _scrubbed(self, text: str | None) -> str:
        assert self._endpoint is not None
        return self._endpoint.scrub(text or "nothing said")

    def _keep(self, message: Finished) -> None:
        finished = message.record
        request = self._requests[finished.id]
        finished.id = request.id
        self._stamped += message.stamped
        finished.error = finished.error and self._scrubbed(finished.error)
        self._writer.add(table.row(finished, request))
        self._standing.add(finished)
        if self._pulse is not None:
            self._pulse.note(finished)

    def _take_the_rest(self, generator: LoadGenerator) -> None:
        """After trouble: let the load generator give up and keep what it still has, for as long as that works."""
        generator.stop()
        deadline = now() + _LAST_WORDS
        with contextlib.suppress(OSError, StackraceError):
            for message in generator.messages(_REFRESH):
                if isinstance(message, Started | Finished | Health):
                    self._hear(message)
                if now() > deadline:
                    break

    def _sample(self, engine: Engine) -> Sampler | None:
        interval = self._point.config["telemetry"]["interval"]
        if interval is None:
            return None
        return Sampler(sources(self._point.backend, engine.endpoint), interval)

    def _keep_telemetry(self) -> None:
        """What was read, if the race began: before, there is no zero to its times."""
        start, sampler = self._standing.start, self._sampler
        if sampler is None:
            return
        sampler.stop()
        if start is None:
            return
        self._telemetry = samples.frame(sampler.samples, start)
        self._writer.keep_telemetry(samples.to_bytes(self._telemetry), sources=sampler.sources)

    def _keep_log(self) -> None:
        """What the engine printed during this point."""
        if self._log is not None and self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._log_from)
                (self._point.folder / "server.log").write_bytes(log.read())


def _meta(point: Point) -> dict[str, Any]:
    return {
        "key": point.key,
        "point": point.labels(),
        "schedule": {
            "hash": point.schedule_hash,
            "requests": len(point.due),
            "repeated_tokens": point.repeated_tokens,
        },
        "provenance": provenance(point),
        "calibration": calibration.load(Path(point.config["calibration"])),
    }
