"""Clips that tests make, by PyAV's own encoders, and what they hold."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from pictures import picture

WIDTH, HEIGHT, FRAMES, RATE = 64, 48, 10, 10


def levels(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture whose upper left quarter is red, with a bright square that moves to the right along the bottom."""
    pixels = np.array(picture(width, height, seed=3))
    pixels[: height // 2, : width // 2] = (200, 30, 30)
    pixels[-12:-4, 3 * index : 3 * index + 8] = 250
    return pixels


def make_film(path, codec="libx264", size=(WIDTH, HEIGHT), times=None, sound="aac", **options):
    """Writes a film of ``FRAMES`` frames at ``RATE`` a second, or shown at ``times`` (milliseconds), and a tone.

    ``options``: ``pixels``, the encoder's pixel format, and attributes of its codec context.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"crf": "10"} if codec == "libx264" else {})
        stream.width, stream.height = size
        stream.pix_fmt = options.pop("pixels", "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        tone = add_tone(container, sound) if sound else None
        for index, time in enumerate(times or range(0, 1000 * FRAMES // RATE, 1000 // RATE)):
            frame = av.VideoFrame.from_ndarray(levels(index, *size), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = 1000 // RATE
                container.mux(packet)
        for packet in stream.encode(None):
            packet.duration = 1000 // RATE
            container.mux(packet)
        if tone is not None:
            write_tone(container, tone)
    return path


def add_tone(container, codec="aac"):
    return container.add_stream(codec, rate=48_000, layout="mono")


def write_tone(container, stream, seconds=FRAMES / RATE):
    """Writes a tone of 440 Hz."""
    import av

    samples = np.sin(2 * np.pi * 440 * np.arange(int(48_000 * seconds)) / 48_000).astype(np.float32)
    resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000, stream.codec_context.frame_size or 1024)
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def turn(path, matrix):
    """Writes the numbers a, b, c, d of a display matrix into an MP4's header of its first track."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: the matrix comes after 40 bytes
    a, b, c, d = (value * 65_536 for value in matrix)
    numbers = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    content[start : start + 36] = numbers
    path.write_bytes(content)


def times_of(path):
    """When each frame of a film is shown, in seconds."""
    import av

    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


def pictures_of(path):
    """The frames of a film as integers [H, W, 3]."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]


def packets_of(path, kind="audio"):
    """Time stamps in seconds and bytes of the packets of sound or subtitles."""
    import av

    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        packets = [packet for packet in container.demux(*streams) if packet.size] if streams else []
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets]


def make_animation(path, durations=(100, 50, 200, 100), transparent=False, loop=0):
    """Writes an animated GIF, WebP or PNG by Pillow."""
    from PIL import Image

    images = [Image.fromarray(levels(index)) for index in range(len(durations))]
    if transparent:
        alpha = Image.fromarray(np.where(np.arange(WIDTH) < 20, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0))
        for image in images:
            image.putalpha(alpha)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    options |= {"disposal": 2} if path.suffix == ".gif" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=list(durations), loop=loop, **options)
    return path


def frames_of(path):
    """The frames of an animation as RGBA, and how long each is shown, in milliseconds."""
    from PIL import Image

    with Image.open(path) as image:
        frames, durations = [], []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            frames.append(np.asarray(image.convert("RGBA")).astype(int))
            durations.append(round(image.info["duration"]))
        return frames, durations
