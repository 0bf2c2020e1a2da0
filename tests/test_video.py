"""Films: painted frame by frame, with their time stamps, sound and subtitles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import FRAMES, HEIGHT, RATE, WIDTH, levels, make_film, packets_of, pictures_of, times_of, turn
from PIL import Image
from refusals import contents

from fastperc.video.clip import Span
from fastperc.video.film import Film

av = pytest.importorskip("av")


@pytest.fixture
def film(here):
    return make_film(here / "clip.mp4")


@pytest.fixture
def stylize(run, model):
    """Runs ``fastperc stylize``, which must succeed, on what is given; returns what it printed."""

    def stylize(*arguments):
        result = run("stylize", *arguments, "--model", model)
        assert result.status == 0, result.err
        return result.err

    return stylize


def test_a_film_is_painted_with_its_sound(film, stylize):
    stylize(film, "-o", "out.mp4")
    assert times_of("out.mp4") == times_of(film) == [index / RATE for index in range(FRAMES)]
    assert packets_of("out.mp4") == packets_of(film) and len(packets_of(film)) > 40
    with av.open("out.mp4") as out, av.open(str(film)) as source:
        assert out.streams.video[0].duration * out.streams.video[0].time_base == FRAMES / RATE
        assert out.duration == pytest.approx(source.duration, abs=1e6 / RATE)
        assert (out.streams.video[0].width, out.streams.video[0].height) == (WIDTH, HEIGHT)
    assert np.abs(pictures_of("out.mp4")[5] - pictures_of(film)[5]).mean() > 5


def test_the_default_name_is_beside_the_film(film, stylize, model):
    stylize(film)
    assert Path(f"clip-{model.stem}.mp4").exists()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".m4v"])
def test_strength_0_is_the_film_itself(film, stylize, suffix):
    stylize(film, "-o", f"out{suffix}", "--strength", 0, "--crf", 1)
    for ours, theirs in zip(pictures_of(f"out{suffix}"), pictures_of(film), strict=True):
        assert np.abs(ours - theirs).mean() < 2.5
        assert np.abs((ours - theirs).mean(axis=(0, 1))).max() < 1.5  # PyAV 17.0 takes the nearest chroma


@pytest.mark.parametrize("name", ["bt709", "full range"])
def test_colours_are_read_as_the_film_says(here, stylize, name):
    options = {"colorspace": 1, "color_range": 1} if name == "bt709" else {"color_range": 2, "pixels": "yuvj420p"}
    make_film(here / "clip.mp4", **options)
    stylize("clip.mp4", "-o", "out.mp4", "--strength", 0, "--crf", 1)
    theirs = Film("clip.mp4")
    with av.open("out.mp4") as out:
        assert out.streams.video[0].codec_context.colorspace == {"bt709": 1}.get(name, 6)
    for ours, frame in zip(Film("out.mp4").frames(), theirs.frames(), strict=True):
        assert (ours.levels.int() - frame.levels.int()).abs().float().mean() < 2.5


def test_variable_frame_rates_are_kept(here, stylize):
    times = [0, 40, 90, 400, 410, 900, 1300]
    make_film(here / "clip.mkv", times=times)
    for name in ("out.mkv", "out.mp4"):
        stylize("clip.mkv", "-o", name)
        assert np.allclose(np.diff(times_of(name)), np.diff(times_of("clip.mkv")), atol=2e-3)


MATRICES = {"left": (0, -1, 1, 0), "right": (0, 1, -1, 0), "half": (-1, 0, 0, -1), "mirrored": (-1, 0, 0, 1)}
TURNED = {
    "left": lambda x: np.rot90(x, 1),
    "right": lambda x: np.rot90(x, -1),
    "half": lambda x: np.rot90(x, 2),
    "mirrored": lambda x: x[:, ::-1],
}


@pytest.mark.parametrize("name", MATRICES)
def test_rotation_is_applied(film, stylize, name):
    stored = pictures_of(film)[4]
    turn(film, MATRICES[name])
    stylize(film, "-o", "out.mp4", "--strength", 0, "--crf", 1)
    ours = pictures_of("out.mp4")[4]
    assert ours.shape == TURNED[name](stored).shape
    assert np.abs(ours - TURNED[name](stored)).mean() < 3


def test_an_angle_that_is_no_quarter_turn_is_refused(film, refused, model):
    turn(film, (0.7, 0.7, -0.7, 0.7))
    refused("stylize", film, "-o", "out.mp4", "--model", model, says="no quarter turn")


def test_odd_sides(here, stylize):
    make_film(here / "odd.mkv", codec="ffv1", size=(61, 47), pixels="yuv444p", sound=None)
    said = stylize("odd.mkv", "-o", "out.mp4", "--strength", 0, "--crf", 1)
    assert "61×47 is written as 62×48" in said
    ours, theirs = pictures_of("out.mp4")[3], pictures_of("odd.mkv")[3]
    assert ours.shape == (48, 62, 3) and np.abs(ours[:47, :61] - theirs).mean() < 6
    stylize("odd.mkv", "-o", "out.webm")
    assert pictures_of("out.webm")[3].shape == (47, 61, 3)


def test_a_part_of_a_film(film, stylize):
    stylize(film, "-o", "out.mp4", "--start", "0:00.3", "--duration", 0.4)
    assert np.allclose(times_of("out.mp4"), [0, 0.1, 0.2, 0.3])
    stylize(film, "-o", "photo-like.mp4", "--start", 0.3, "--duration", 0.4, "--strength", 0, "--crf", 1)
    assert np.abs(pictures_of("photo-like.mp4")[0] - pictures_of(film)[3]).mean() < 3
    sound, whole = packets_of("out.mp4"), dict((data, time) for time, data in packets_of(film))
    assert 15 <= len(sound) <= 20
    assert all(abs(whole[data] - time - 0.3) < 0.03 for time, data in sound)


def test_a_part_that_holds_no_frame(film, refused, model):
    refused("stylize", film, "-o", "out.mp4", "--model", model, "--start", 60, says="it lasts 1.00 s")


def test_subtitles_and_words_are_copied(here, stylize):
    make_film(here / "clip.mkv", sound=None)
    Path("lines.srt").write_text("1\n00:00:00,200 --> 00:00:00,500\nhello\n\n2\n00:00:00,600 --> 00:00:00,900\nyou\n")
    with av.open("clip.mkv") as film, av.open("lines.srt") as lines, av.open("subtitled.mkv", "w") as container:
        container.metadata["title"] = "a title"
        sources = (film.streams[0], lines.streams[0])
        streams = [container.add_stream_from_template(source, opaque=True) for source in sources]
        for source, stream in zip(sources, streams):
            for packet in source.container.demux():
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
    stylize("subtitled.mkv", "-o", "out.mkv")
    assert packets_of("out.mkv", "subtitle") == packets_of("subtitled.mkv", "subtitle") and packets_of(
        "out.mkv", "subtitle"
    )
    with av.open("out.mkv") as out:
        assert {key.lower(): value for key, value in out.metadata.items()}["title"] == "a title"
    assert "left out subtitles" in stylize("subtitled.mkv", "-o", "out.mp4")


ENCODERS = {
    "libx265": ".mp4",
    "libsvtav1": ".mkv",
    "ffv1": ".mkv",
    "mpeg4": ".mp4",
    "prores_ks": ".mov",
    "vp9": ".webm",
}


@pytest.mark.parametrize("codec", ENCODERS)
def test_other_encoders(here, stylize, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    make_film(here / "clip.mp4", sound=None)
    said = stylize("clip.mp4", "-o", f"out{ENCODERS[codec]}", "--codec", codec, "--strength", 0)
    assert len(said.splitlines()) == 1, "an encoder prints"
    assert np.allclose(times_of(f"out{ENCODERS[codec]}"), times_of("clip.mp4"), atol=1e-3)
    assert np.abs(pictures_of(f"out{ENCODERS[codec]}")[5] - pictures_of("clip.mp4")[5]).mean() < 8


def test_sound_that_the_format_cannot_hold_is_refused(film, refused, model):
    says = "out.webm: this format does not hold the sound (aac); use .mkv"
    refused("stylize", film, "-o", "out.webm", "--model", model, says=says)


def test_formats_that_are_not_written_become_mkv(here, stylize, model):
    make_film(here / "clip.avi", codec="mpeg4", sound=None)
    stylize("clip.avi")
    assert len(times_of(f"clip-{model.stem}.avi.mkv")) == FRAMES


def test_hdr_becomes_sdr(here, stylize):
    # A gray of half the code in HLG is about 26 % of white on a display (ITU-R BT.2408).
    with av.open("hlg.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 9, 9, 18, 1
        green = (431, 431, 409)  # R, G and B of 0.25, 0.5 and 0.25
        for codes in ((64, 512, 512), (502, 512, 512), (940, 512, 512), green):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p10le")
            for plane, value in zip(frame.planes, codes):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "is HDR (HLG)" in stylize("hlg.mkv", "-o", "out.mp4", "--strength", 0)
    colours = [frame.levels.float().mean((0, 1)) for frame in Film("hlg.mkv").frames()]
    black, gray, white = (float(colour.mean()) for colour in colours[:3])
    assert black < 2 and 120 < gray < 155 and 245 < white <= 255
    assert all(colour.max() - colour.min() < 2 for colour in colours[:3])
    red, green, blue = colours[3].tolist()
    assert 120 < green < 155 and max(red, blue) < 80  # red lies outside of BT.709
    with av.open("out.mp4") as out:
        assert out.streams.video[0].codec_context.color_trc == 1


def test_frames_alone_or_with_a_film(film, stylize):
    stylize(film, "--frames-dir", "frames")
    assert sorted(path.name for path in Path("frames").iterdir()) == [f"{n:06}.png" for n in range(1, FRAMES + 1)]
    assert sorted(path.name for path in Path().iterdir()) == ["clip.mp4", "frames", "photo.png"]
    stylize(film, "--frames-dir", "more", "-o", "out.mp4")
    first = np.asarray(Image.open("more/000001.png")).astype(int)
    assert np.abs((first - pictures_of("out.mp4")[0]).mean(axis=2)).mean() < 8
    assert Path("more/000001.png").read_bytes() == Path("frames/000001.png").read_bytes()


def test_frames_are_those_of_photos(film, stylize, run, model):
    stylize(film, "--frames-dir", "frames")
    frame = next(Film(film).frames()).levels
    Image.fromarray(frame.numpy()).save("frame.png")
    stylize("frame.png", "-o", "painted.png")
    assert (np.asarray(Image.open("painted.png")) == np.asarray(Image.open("frames/000001.png"))).all()


def test_a_film_is_enlarged(film, run, sr_model):
    result = run("sr", "upscale", film, "-o", "large.mp4", "--model", sr_model)
    assert result.status == 0, result.err
    assert pictures_of("large.mp4")[0].shape == (4 * HEIGHT, 4 * WIDTH, 3)
    assert times_of("large.mp4") == times_of(film) and packets_of("large.mp4") == packets_of(film)


def test_a_folder_with_photos_and_films(film, stylize, run, model):
    folder = Path("folder")
    folder.mkdir()
    film.rename(folder / "clip.mp4")
    Path("photo.png").rename(folder / "photo.png")
    stylize("folder", "-o", "painted")
    assert sorted(path.name for path in Path("painted").iterdir()) == ["clip.mp4", "photo.png"]
    (folder / "bad.mp4").write_bytes(b"no film")
    result = run("stylize", "folder", "-o", "again", "--model", model)
    assert result.status == 2 and "skipped folder/bad.mp4: not a film" in result.err
    assert sorted(path.name for path in Path("again").iterdir()) == ["clip.mp4", "photo.png"]


def test_earlier_results_are_left_out(film, stylize, model):
    make_film(film.with_name("old.avi"), codec="mpeg4", sound=None)
    Path("photo.png").unlink()
    stylize("clip.mp4", "old.avi")
    said = stylize("clip.mp4", "old.avi", f"clip-{model.stem}.mp4", f"old-{model.stem}.avi.mkv")
    assert "skipped 2 earlier results" in said


REFUSED = {
    "not a film": (lambda film: film.write_bytes(b"no film"), [], "clip.mp4: not a film, damaged or cut short"),
    "empty": (lambda film: film.write_bytes(b""), [], "clip.mp4: not a film"),
    "cut short": (lambda film: film.write_bytes(film.read_bytes()[:3000]), [], "clip.mp4: not a film"),
    "missing": (lambda film: film.unlink(), [], "no such file"),
    "no encoder": (None, ["--codec", "nonsense"], "--codec nonsense: PyAV has no such encoder"),
    "an encoder of sound": (None, ["--codec", "aac"], "--codec aac: PyAV has no such encoder of video"),
    "no crf": (None, ["--codec", "mpeg4", "--crf", "3"], "--crf: mpeg4 has no such quality"),
    "as a picture": (None, ["-o", "out.png"], "out.png: cannot write a clip as '.png'"),
    "as something else": (None, ["-o", "out.xyz"], "out.xyz: cannot write a clip as '.xyz'"),
    "over itself": (None, ["-o", "clip.mp4"], "would overwrite an input"),
    "no time": (None, ["--start", "soon"], "soon is not a time"),
    "no length": (None, ["--duration", "0"], "0 is not above 0"),
    "smooth": (None, ["--smooth", "2"], "2 is not between 0 and 1"),
    "too large": (None, ["--size", "40000"], "is larger than"),
    "too small": (None, ["--size", "16"], "is too small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(film, refused, model, name):
    change, options, says = REFUSED[name]
    if change is not None:
        change(film)
    refused("stylize", film, "-o", "out.mp4", "--model", model, *options, says=says)


def test_a_film_that_ends_early_is_refused_and_can_be_cut(here, refused, stylize, model):
    make_film(here / "whole.mkv", codec="ffv1", sound=None)
    content = Path("whole.mkv").read_bytes()
    Path("cut.mkv").write_bytes(content[: len(content) // 2])
    refused("stylize", "cut.mkv", "-o", "out.mkv", "--model", model, says="cut short: it ends after 0.")
    stylize("cut.mkv", "-o", "out.mkv", "--duration", 0.3)
    assert len(times_of("out.mkv")) == 3


def test_sound_without_video(here, refused, model):
    from clips import add_tone, write_tone

    with av.open("sound.mp4", "w") as container:
        write_tone(container, add_tone(container))
    refused("stylize", "sound.mp4", "-o", "out.mp4", "--model", model, says="sound.mp4: holds no video")


def test_options_of_clips_need_a_clip(refused, model):
    refused("stylize", "photo.png", "-o", "out.png", "--crf", 3, "--model", model, says="--crf is for clips")


def test_without_pyav_films_are_refused_or_named(film, refused, run, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setattr("fastperc.video.formats.find_spec", lambda name: None)
    refused("stylize", film, "-o", "out.mp4", "--model", model, says="run `pip install 'fastperc[video]'`")
    result = run("stylize", ".", "-o", "painted", "--model", model)
    assert result.status == 2 and "skipped 1 file (clip.mp4); .mp4: run `pip install 'fastperc[video]'`" in result.err
    assert contents(Path("painted")).keys() == {Path("painted/photo.png")}


def test_the_part_is_found_by_seeking(film):
    with_start = [(frame.pts, frame.levels) for frame in Film(film, Span(0.5)).frames()]
    whole = [(frame.pts, frame.levels) for frame in Film(film).frames()]
    offset = whole[5][0]
    assert [pts + offset for pts, _ in with_start] == [pts for pts, _ in whole[5:]]
    assert all((a == b).all() for (_, a), (_, b) in zip(with_start, whole[5:]))


def test_frames_are_drawn_as_expected(film):
    for index, frame in enumerate(Film(film).frames()):
        assert np.abs(frame.levels.numpy().astype(int) - levels(index)).mean() < 6
