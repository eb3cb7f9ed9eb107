"""Images on their way to a vision encoder: bytes become pixels, and pixels what a family's encoder reads.

``reader.ImageReader`` is the way in, ``processor.Processor`` what a family offers. Nothing is imported here, so that
reading settings does not wait for Pillow.
"""
