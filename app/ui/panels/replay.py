"""Saving the conversation with its routing as a page of its own."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.services.answering import LastRecords
from app.services.chat_targets import target_label
from app.services.conversation import turns_of
from app.services.routing_stream import ROUTING_RECORDS
from app.ui.wiring import QUIET, click_on, export_folder
from app.views.replay import ReplayedReply, replay_page

NOTHING = "Send a message first: a replay shows how its reply was routed."
GONE = "The routing of these replies is no longer kept. Regenerate the last one, then save it."


def wire_replay(button: gr.Button, chatbots: list[gr.Chatbot], given: list[Any]) -> None:
    """Save on a click; `given` are the target, the compared ones, the `LastRecords` and the system prompt."""
    download = gr.DownloadButton("Download", visible="hidden", elem_id="chat-replay-download")
    button.click(save_replay, [*given, *chatbots], download, show_progress_on=button, api_visibility="private")
    download.change(None, None, None, js=click_on("chat-replay-download"), **QUIET)


def save_replay(target: str, compare: list[str], records: LastRecords, system: str, *histories: list[Any]) -> str:
    """The page of the conversation, and of those beside it, in Gradio's folder of downloads; returns its path."""
    replies = []
    for place, (name, history) in enumerate(zip([target, *compare], histories, strict=False)):
        record = ROUTING_RECORDS.get(records.by_place.get(place, ""))
        if record is not None and history:
            replies.append(ReplayedReply(target_label(name), turns_of(history), record, system.strip()))
    if not replies:
        raise gr.Error(GONE if records.by_place else NOTHING, title="Not saved", print_exception=False)
    path = export_folder() / "replay.html"
    path.write_text(replay_page(replies), encoding="utf-8")
    return str(path)
