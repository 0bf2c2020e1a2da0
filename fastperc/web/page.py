"""The page: tabs for photos, enlarging, clips and a camera, built of Gradio's components."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import gradio as gr

from fastperc.progress import Watch
from fastperc.web.limits import check_photo
from fastperc.web.studio import Picture, Studio
from fastperc.web.values import LARGEST_SIDE, SMALLEST_SIDE, upload_path, with_message

ENGINE = "engine"  # Gradio's name of what one event at a time may use
PHOTO_SIDE, CLIP_SIDE, CAMERA_SIDE = 1024, 640, 640  # pixels: the longer side that the page suggests
LARGEST_SHOWN = 10  # the largest stroke that the slider offers
METHODS = [("Clean", "pixel"), ("Sharp", "feature"), ("SRCNN", "srcnn")]
PLAYABLE = frozenset({".mp4", ".webm"})  # of what is written, by any browser
# Options of events that answer at once.
HIDDEN: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")


class StyleControls(NamedTuple):
    """The components that say how to paint, in the order in which handlers get their values."""

    style: gr.Textbox
    strength: gr.Slider
    size: gr.Slider
    keep_colors: gr.Checkbox
    stroke: gr.Slider


class Work(NamedTuple):
    """The components of a tab that start its work and show how it goes."""

    tab: str
    start: gr.Button
    cancel: gr.Button
    message: gr.HTML


def showing(progress: gr.Progress, verb: str) -> Watch:
    """A :data:`fastperc.progress.Watch` that moves the page's progress bar."""

    def watch(items: Iterable[int], title: str, total: int) -> Iterator[int]:
        for index, item in enumerate(items):
            progress((index, total), desc=verb, unit="tiles")
            yield item

    return watch


# Parts of the tabs


def style_controls(thumbnails: list[Any], side: int, selected: str) -> StyleControls:
    """The gallery of styles, the sliders of strength, size and stroke, and the choice of colours."""
    names = [name for _, name in thumbnails]
    gallery = gr.Gallery(
        [(image, words(name)) for image, name in thumbnails],
        label="Style",
        show_label=False,
        columns=3,
        selected_index=names.index(selected),
        allow_preview=False,
        interactive=False,
        buttons=[],
        height="auto",
        object_fit="cover",
        elem_classes="styles",
    )
    style = gr.Textbox(selected, visible="hidden")

    def select(event: gr.SelectData) -> str:
        return names[event.index] if isinstance(event.index, int) and 0 <= event.index < len(names) else selected

    gallery.select(select, None, style, **HIDDEN)
    strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", buttons=[])
    size = gr.Slider(SMALLEST_SIDE, max(side, 4096), side, step=1, label="Longer side in pixels", buttons=[])
    stroke = gr.Slider(0, LARGEST_SHOWN, 0, step=0.1, label="Stroke size (0: auto)", buttons=[])
    keep_colors = gr.Checkbox(False, label="Keep the colours of the original")
    return StyleControls(style, strength, size, keep_colors, stroke)


def words(name: str) -> str:
    """The name of a style as a caption."""
    return name.replace("_", " ").capitalize()


def work_controls(tab: str, verb: str) -> Work:
    """The buttons that start and cancel the work of a tab, and the line below them."""
    with gr.Row():
        start = gr.Button(verb, variant="primary", elem_id=f"{tab}-start", scale=3, min_width=120)
        cancel = gr.Button("Cancel", interactive=False, elem_id=f"{tab}-cancel", scale=1, min_width=80)
    return Work(tab, start, cancel, gr.HTML("", elem_id=f"{tab}-message", elem_classes="message"))


def run_on_click(
    studio: Studio, work: Work, run: Callable[..., Any], inputs: list[Any], outputs: list[Any], shown: Any
) -> None:
    """Has the start button run ``run`` in the queue, and the cancel button end it.

    Args:
        studio: whose jobs are begun and cancelled.
        work: the tab's buttons.
        run: the handler; its last result is the message.
        inputs, outputs: components; the message is the last output.
        shown: the component that shows progress.
    """

    def begin(request: gr.Request) -> list[Any]:
        studio.begin(str(request.session_hash), work.tab)
        return [gr.update(interactive=False), gr.update(interactive=True), ""]

    def cancel(request: gr.Request) -> list[Any]:
        studio.job(str(request.session_hash), work.tab).cancel()
        return [*finish(), "Cancelled."]

    def finish() -> list[Any]:
        return [gr.update(interactive=True), gr.update(interactive=False)]

    buttons = [work.start, work.cancel]
    begun = work.start.click(begin, None, [*buttons, work.message], **HIDDEN)
    running = begun.then(
        run,
        inputs,
        outputs,
        preprocess=False,
        concurrency_id=ENGINE,
        concurrency_limit=1,
        show_progress="full",
        show_progress_on=shown,
        api_visibility="undocumented",
        api_name=work.tab,
    )
    running.then(finish, None, buttons, **HIDDEN)
    work.cancel.click(cancel, None, [*buttons, work.message], cancels=[running], **HIDDEN)


def shown_picture(picture: Picture) -> list[Any]:
    """Updates of the slider and of the download button."""
    width, height = picture.size
    label = f"Download · {width} × {height}"
    return [
        gr.update(value=(picture.before, picture.after), visible=True),
        gr.update(value=picture.file, label=label, interactive=True),
    ]


NO_PICTURE = [gr.update(value=None), gr.update(value=None, label="Download", interactive=False)]


def photo_input(studio: Studio, message: gr.HTML, size: gr.Slider | None, name: str) -> gr.Image:
    """The place where a photo is dropped. The line ``message`` says what is wrong with it, ``size`` follows it."""
    photo = gr.Image(
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        label="Your photo",
        height=300,
        buttons=[],
        elem_id=name,
        placeholder="Drop a photo here\n- or -\nclick to choose one",
        webcam_options=gr.WebcamOptions(mirror=False),
    )

    def look(upload: Any) -> Any:
        limit = gr.update()

        def measured() -> list[Any]:
            nonlocal limit
            long_side = max(check_photo(upload_path(upload, studio, "photo"), studio.limits))
            limit = size_limit(long_side, PHOTO_SIDE)
            return []

        (text,) = with_message(studio, [], measured)
        return text if size is None else [text, limit]

    photo.upload(look, photo, [message] if size is None else [message, size], preprocess=False, **HIDDEN)
    photo.clear(lambda: "", None, message, **HIDDEN)
    return photo


def size_limit(long_side: int, suggested: int) -> Any:
    """The update of a slider of sizes for an input of that size."""
    longest = min(max(long_side, SMALLEST_SIDE + 1), LARGEST_SIDE)
    return gr.update(maximum=longest, value=min(suggested, longest))


def result_of_photo(name: str) -> tuple[gr.ImageSlider, gr.DownloadButton]:
    """The slider of before and after, and the button that downloads the picture at full size."""
    slider = gr.ImageSlider(
        label="Before and after",
        type="filepath",
        interactive=False,
        buttons=["fullscreen"],
        elem_id=f"{name}-result",
        max_height=720,
    )
    return slider, gr.DownloadButton("Download", interactive=False, elem_id=f"{name}-download")
