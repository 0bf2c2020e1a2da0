"""The tabs of the page, and the page as a whole."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import gradio as gr

from fastperc.web.camera import Live, LiveOptions
from fastperc.web.clips import Part, measure, paint_upload
from fastperc.web.page import (
    CAMERA_SIDE,
    CLIP_SIDE,
    HIDDEN,
    METHODS,
    NO_PICTURE,
    PHOTO_SIDE,
    PLAYABLE,
    photo_input,
    result_of_photo,
    run_on_click,
    showing,
    shown_picture,
    size_limit,
    style_controls,
    work_controls,
)
from fastperc.web.studio import Studio
from fastperc.web.values import number, style_options, upload_path, with_message

TITLE = "fastperc"
LONGEST = 1e7  # seconds
POLL = 2  # seconds between two looks at how the camera is


def photo_tab(studio: Studio, thumbnails: list[Any], selected: str) -> None:
    """Paints a photo."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            place = gr.Column()
            controls = style_controls(thumbnails, PHOTO_SIDE, selected)
            work = work_controls("paint", "Paint")
        with gr.Column(scale=3, min_width=320):
            slider, download = result_of_photo("paint")
    with place:
        photo = photo_input(studio, work.message, controls.size, "paint-photo")

    def paint(
        upload: Any,
        style: Any,
        strength: Any,
        size: Any,
        keep_colors: Any,
        stroke: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio passes it
    ) -> list[Any]:
        def painted() -> list[Any]:
            path = upload_path(upload, studio, "photo")
            options = style_options(style, strength, size, keep_colors, stroke)
            job = studio.job(str(request.session_hash), "paint")
            return shown_picture(studio.paint(path, options, job, showing(progress, "Painting")))

        return with_message(studio, NO_PICTURE, painted)

    run_on_click(studio, work, paint, [photo, *controls], [slider, download, work.message], slider)


def enlarge_tab(studio: Studio) -> None:
    """Enlarges a photo."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            place = gr.Column()
            scale = gr.Radio([("4 times", 4), ("8 times", 8)], value=4, label="How large")
            method = gr.Radio(METHODS, value="pixel", label="How", info="Sharp adds detail, and a faint grid.")
            work = work_controls("enlarge", "Enlarge")
        with gr.Column(scale=3, min_width=320):
            slider, download = result_of_photo("enlarge")
    with place:
        photo = photo_input(studio, work.message, None, "enlarge-photo")

    def enlarge(
        upload: Any,
        scale: Any,
        method: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        def enlarged() -> list[Any]:
            path, times = upload_path(upload, studio, "photo"), int(number(scale, 2, 16, "the scale"))
            job = studio.job(str(request.session_hash), "enlarge")
            return shown_picture(studio.enlarge(path, str(method), times, job, showing(progress, "Enlarging")))

        return with_message(studio, NO_PICTURE, enlarged)

    run_on_click(studio, work, enlarge, [photo, scale, method], [slider, download, work.message], slider)


def clip_tab(studio: Studio, thumbnails: list[Any], selected: str) -> None:
    """Paints a clip."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            clip = gr.Video(sources=["upload"], label="Your clip", height=300, buttons=[], elem_id="clip-video")
            controls = style_controls(thumbnails, CLIP_SIDE, selected)
            smooth = gr.Slider(0, 1, 0.25, step=0.05, label="Less flicker", buttons=[])
            with gr.Row():
                start = gr.Number(0, minimum=0, label="Start in seconds", min_width=120)
                length = gr.Number(0, minimum=0, label="Length (0: all)", min_width=120)
            work = work_controls("clip", "Paint the clip")
        with gr.Column(scale=3, min_width=320):
            result = gr.Video(label="Painted", interactive=False, buttons=[], elem_id="clip-result")
            download = gr.DownloadButton("Download", interactive=False, elem_id="clip-download")

    def look(upload: Any) -> list[Any]:
        size = gr.update()

        def measured() -> list[Any]:
            nonlocal size
            size = size_limit(max(measure(upload_path(upload, studio, "clip")).size), CLIP_SIDE)
            return []

        return [*with_message(studio, [], measured), size]

    clip.upload(look, clip, [work.message, controls.size], preprocess=False, **HIDDEN)
    clip.clear(lambda: "", None, work.message, **HIDDEN)
    paint = clip_handler(studio)
    inputs, outputs = [clip, *controls, smooth, start, length], [result, download, work.message]
    run_on_click(studio, work, paint, inputs, outputs, result)


def clip_handler(studio: Studio) -> Callable[..., list[Any]]:
    """The function that paints a clip with the values of the tab's components."""
    nothing = [gr.update(value=None), gr.update(value=None, interactive=False)]

    # Gradio finds these two by their types, wherever they stand.
    def paint(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008
        upload, style, strength, size, keep_colors, stroke, smooth, start, length = values

        def show(done: int, total: int) -> None:
            progress((done, total) if total else 0, desc="Painting", unit="frames")

        def painted() -> list[Any]:
            path = upload_path(upload, studio, "clip")
            options = style_options(style, strength, size, keep_colors, stroke)
            seconds = number(length, 0, LONGEST, "the length") if length else None
            part = Part(number(start or 0, 0, LONGEST, "the start"), seconds, number(smooth, 0, 1, "the flicker"))
            job = studio.job(str(request.session_hash), "clip")
            target = paint_upload(studio, path, options, part, job, show)
            shown = gr.update(value=target if target.suffix in PLAYABLE else None)
            return [shown, gr.update(value=target, interactive=True)]

        return with_message(studio, nothing, painted)

    return paint


def live_tab(live: Live, thumbnails: list[Any]) -> None:
    """Shows the painted picture of the camera."""
    initial = live.options
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            gr.HTML('<img id="live-picture" src="live" alt="The painted picture of the camera">')
            message = gr.HTML("", elem_classes="message", elem_id="live-message")
        with gr.Column(scale=2, min_width=320):
            controls = style_controls(thumbnails, initial.style.long_side or CAMERA_SIDE, initial.style.style)
            smooth = gr.Slider(0, 1, initial.smooth, step=0.05, label="Less flicker", buttons=[])

    def change(style: Any, strength: Any, size: Any, keep_colors: Any, stroke: Any, smooth: Any) -> str:
        def changed() -> list[Any]:
            options = style_options(style, strength, size, keep_colors, stroke)
            live.options = LiveOptions(options, number(smooth, 0, 1, "the flicker"))
            return []

        (text,) = with_message(live.studio, [], changed)
        return text

    def fault() -> str:
        if live.fault:
            return html.escape(live.studio.sentence(live.fault), quote=False)
        return "The camera has stopped." if live.over else ""

    gr.Timer(POLL).tick(fault, None, message, **HIDDEN)
    inputs: list[Any] = [*controls, smooth]
    controls.strength.value, controls.keep_colors.value = initial.style.strength, initial.style.keep_colors
    controls.stroke.value = 0 if initial.style.stroke == "auto" else initial.style.stroke
    gr.on([component.change for component in inputs], change, inputs, message, preprocess=False, **HIDDEN)


def build(studio: Studio, live: Live | None = None, selected: str | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        studio: does the work.
        live: a camera; its tab is the first then.
        selected: the style that is chosen at first. Default: the first.

    Raises:
        InputError: the file of a style cannot be read.
    """
    thumbnails = studio.thumbnails()
    selected = selected or thumbnails[0][1]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# fastperc\nWhat you upload stays on the computer that serves this page.")
        with gr.Tabs():
            if live is not None:
                with gr.Tab("Live", id="live"):
                    live_tab(live, thumbnails)
            with gr.Tab("Paint", id="paint"):
                photo_tab(studio, thumbnails, selected)
            with gr.Tab("Enlarge", id="enlarge"):
                enlarge_tab(studio)
            with gr.Tab("Clips", id="clips"):
                clip_tab(studio, thumbnails, selected)

        def leave(request: gr.Request) -> None:
            studio.end(str(request.session_hash))

        page.unload(leave)
    page.queue(max_size=studio.limits.waiting, api_open=False, default_concurrency_limit=1)
    return page
