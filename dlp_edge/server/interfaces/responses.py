"""What `/v1/responses` sends: one document, or the events that build it up."""

from __future__ import annotations

from copy import deepcopy
from time import time
from typing import Any
from uuid import uuid4

from dlp_edge.server.chat_request import ChatRequest
from dlp_edge.server.interfaces.interface import Interface
from dlp_edge.server.interfaces.responses_request import parse_response
from dlp_edge.server.openai_schema import Document, about, usage_of
from dlp_edge.types import Chunk, Reply, ToolCallPiece

_CUT = ("length", "cancelled")


class ResponseDocuments:
    """What is sent about one answer; all documents share its id."""

    def __init__(self, order: ChatRequest) -> None:
        options: dict[str, Any] = {**order.options}
        self._count = 0  # of events
        self._items: list[Document] = []  # of the output, as far as they are known
        self._open: Document | None = None  # the item that is being written
        self._response: Document = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": options["max_new_tokens"],
            "metadata": {},
            "model": order.model,
            "output": [],
            "parallel_tool_calls": options.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": options.get("temperature", 0.0),
            "text": {"format": {"type": "text"}},
            "tool_choice": options.get("tool_choice", "auto"),
            "tools": options.get("tools", []),
            "top_p": options.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
        }

    def first(self) -> list[Document]:
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
        ]

    def piece(self, chunk: Chunk) -> list[Document]:
        own = {"sentence": chunk.sentence, "fusion": chunk.fusion, "request": chunk.request}
        call = chunk.tool_call
        events = self._begin(_message() if call is None else _call(call))
        item = self._items[-1]
        if call is None:
            item["content"][0]["text"] += chunk.text
            delta: Document = {"content_index": 0, "delta": chunk.text, "logprobs": []}
            events.append(self._about_item("response.output_text.delta", dlp_edge=own, **delta))
        elif call.arguments_text:
            item["arguments"] += call.arguments_text
            kind = "response.function_call_arguments.delta"
            events.append(self._about_item(kind, delta=call.arguments_text, dlp_edge=own))
        return events

    def last(self, reply: Reply) -> list[Document]:
        cut = reply.finish_reason in _CUT
        events = self._end("incomplete" if cut else "completed")
        kind = "response.incomplete" if cut else "response.completed"
        return [*events, self._event(kind, response=self._whole(reply, self._items))]

    def whole(self, reply: Reply) -> Document:
        status = "incomplete" if reply.finish_reason in _CUT else "completed"
        items: list[Document] = []
        if reply.text or not reply.tool_calls:
            items.append({**_message(), "content": [_part(reply.text)], "status": status})
        for index, call in enumerate(reply.tool_calls):
            item = _call(ToolCallPiece(index, call.id, call.name, ""))
            items.append({**item, "arguments": call.arguments_text, "status": "completed"})
        return self._whole(reply, items)

    def _whole(self, reply: Reply, items: list[Document]) -> Document:
        cut, usage = reply.finish_reason in _CUT, usage_of(reply)
        return {
            **self._response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage.get("prompt_tokens_details", {"cached_tokens": 0}),
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "dlp_edge": about(reply),
        }

    def _begin(self, item: Document) -> list[Document]:
        """What announces an item, unless it is the open one."""
        before = self._open
        if before is not None and before.get("call_id") == item.get("call_id"):
            return []
        events = self._end("completed")
        self._open = item
        self._items.append(item)
        events.append(self._about_item("response.output_item.added", whole=True))
        if item["type"] == "message":
            item["content"] = [_part("")]
            kind = "response.content_part.added"
            events.append(self._about_item(kind, content_index=0, part=_part("")))
        return events

    def _end(self, status: str) -> list[Document]:
        """What closes the open item."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "message":
            text = item["content"][0]["text"]
            done: Document = {"content_index": 0, "text": text, "logprobs": []}
            events = [
                self._about_item("response.output_text.done", **done),
                self._about_item("response.content_part.done", content_index=0, part=_part(text)),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._about_item("response.function_call_arguments.done", **done)]
        events.append(self._about_item("response.output_item.done", whole=True))
        self._open = None
        return events

    def _about_item(self, kind: str, whole: bool = False, **more: Any) -> Document:
        item = self._items[-1]
        named: Document = {"item": deepcopy(item)} if whole else {"item_id": item["id"]}
        return self._event(kind, output_index=len(self._items) - 1, **named, **more)

    def _event(self, kind: str, **more: Any) -> Document:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **more}


def _part(text: str) -> Document:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message() -> Document:
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _call(piece: ToolCallPiece) -> Document:
    return {
        "id": f"fc_{uuid4().hex}",
        "type": "function_call",
        "status": "in_progress",
        "call_id": piece.id,
        "name": piece.name,
        "arguments": "",
    }


RESPONSES = Interface(parse_response, ResponseDocuments, named=True)
