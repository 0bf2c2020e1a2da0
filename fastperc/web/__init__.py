"""The web page: painting photos, clips and a camera in a browser, on Gradio.

``studio`` does the work and knows nothing of the page; ``page`` is the page; ``server`` serves it; ``camera`` is the
live picture of a camera.
"""
