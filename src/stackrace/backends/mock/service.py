"""Which request gets which answer."""

import itertools
import random

from stackrace.backends.mock import question
from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.connection import Call, Connection
from stackrace.backends.mock.events import Events, reply, stream_head
from stackrace.backends.mock.fate import draw
from stackrace.backends.mock.freeze import Freeze
from stackrace.backends.mock.places import Places
from stackrace.backends.mock.pump import Pump
from stackrace.backends.mock.question import Question
from stackrace.backends.mock.script import Script
from stackrace.backends.mock.stream import Head, Stream
from stackrace.backends.mock.times import nanoseconds
from stackrace.backends.mock.truth import Log, Truth

_MODELS = {"object": "list", "data": [{"id": "mock", "object": "model"}]}
_PLANTED = {"error": {"message": "planted by the mock", "type": "server_error"}}
_NO_TRUTH = {"error": {"message": "backend.record_truth is false", "type": "not_found"}}


class Service:
    """The API: completions, chats, models, health and the truth."""

    def __init__(self, b: Behaviour, freeze: Freeze) -> None:
        log = Log(b.record_truth)
        self.pump = Pump(log)
        self._b, self._freeze = b, freeze
        self._rng = random.Random(b.seed)
        self._truth = Truth(log) if b.record_truth else None
        self._places = Places(b.max_num_seqs)
        self._orders = itertools.count()
        self._apis = {b"/v1/completions": Events(b, is_chat=False), b"/v1/chat/completions": Events(b, is_chat=True)}

    def answer(self, connection: Connection, call: Call) -> None:
        """At once, but for streams."""
        if events := self._apis.get(call.url):
            self._complete(connection, call, events)
        elif call.url == b"/truth":
            told = reply(200, self._truth.take(), call.closes) if self._truth else reply(404, _NO_TRUTH, call.closes)
            connection.reply(told)
        elif call.url == b"/v1/models":
            connection.reply(reply(200, _MODELS, call.closes))
        else:
            connection.reply(reply(200 if call.url == b"/health" else 404, {}, call.closes))

    def _complete(self, connection: Connection, call: Call, events: Events) -> None:
        try:
            q = question.read(call.body, events.is_chat, self._b.template_tokens)
        except ValueError as e:
            error = {"error": {"message": str(e), "type": "invalid_request_error"}}
            connection.reply(reply(400, error, call.closes))
            return
        if q.is_streamed:
            self._stream(connection, call, events, q)
        else:
            connection.reply(reply(200, events.whole(q), call.closes))

    def _stream(self, connection: Connection, call: Call, events: Events, q: Question) -> None:
        b, arrived = self._b, call.arrived
        self._freeze.count_from(arrived)
        is_refused = self._rng.random() < b.error_share
        status = b.error_status if is_refused else 200
        head_order, order = next(self._orders), next(self._orders)
        record = self._truth.record(order, q.seed, arrived, status) if self._truth else None
        if is_refused:
            connection.reply(reply(status, _PLANTED, call.closes))
            return
        script = Script(b, q, events, draw(b, events.sends(q.tokens), self._rng))
        length = script.length() if b.transfer == "length" else 0
        if b.transfer == "close":
            connection.is_last = True
        head = stream_head(b.transfer, length, connection.is_last)
        delay = nanoseconds(b.head_delay)
        self.pump.add(next(Head(connection, head, head_order, arrived, delay).steps))
        Stream(script, connection, self.pump, self._places).ask(order, arrived, arrived + delay, record)
