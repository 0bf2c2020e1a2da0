"""Painting clips: films by PyAV, animated GIF, WebP and PNG by Pillow. See docs/video.md."""
