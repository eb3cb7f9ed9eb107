"""What an operator may say about images. Each note says what turning the value up and down does."""

from dataclasses import dataclass
from typing import Annotated

import msgspec

from penstock.config import Count, Seconds

Limit = Annotated[int, msgspec.Meta(ge=0)]
"""Most of what a request may have; 0 allows none."""
HostEntry = Annotated[str, msgspec.Meta(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_.-]+)(:[0-9]{1,5})?$")]
"""``example.com``, ``*.example.com``, ``example.com:8443``, ``*``"""


DECODED_PIXEL_BYTES = 16
"""Of a pixel while it is decoded and made upright, transparent parts white, at most"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """Which images a model that sees is shown, and what reading them may cost."""

    max_images: Limit = 32
    """Most images and videos in one request. Up: more load by one request. Down: less."""
    max_body_bytes: Count = 32 * 1024 * 1024
    """Largest request body, where that is more than `server.max_body_bytes`: images come in base64, which takes a third
    more than they do. Up: more and larger images. Down: less memory a stranger can claim."""
    max_bytes: Count = 20 * 1024 * 1024
    """Largest image file. Up: larger ones. Down: less memory and time for one."""
    max_pixels: Count = 25_000_000
    """Most pixels of an image, or of all frames of a video. Each takes up to 16 bytes while it is decoded. Up: larger
    ones. Down: less memory and time for one."""
    max_seen_pixels: Count = 1_605_632
    """Most pixels of an image, or of a video's frame, that a model is shown which sees images in their own shape:
    larger ones are shrunk, whatever the checkpoint allows. A bound on the memory and time of encoding one. Up: finer
    print is read. Down: less memory and time for one."""
    max_frames: Count = 128
    """Most frames of a video."""
    allowed_hosts: tuple[HostEntry, ...] = ()
    """Hosts that http(s) images are fetched from: example.com, *.example.com for those below it, example.com:8443 for
    another port than 80 and 443, * for all. Empty: images come in the request, as data: URLs."""
    allow_private_addresses: bool = False
    """Fetch from allowed hosts whose address is not public: this machine's and its network's. Only where callers may
    reach those themselves."""
    fetch_timeout_s: Seconds = 10.0
    """How long fetching an image may take, redirects included. Up: slower hosts. Down: requests fail sooner."""
    max_redirects: Limit = 3
    """Most redirects on the way to an image."""
    workers: Count = 2
    """Images that are decoded and resized at a time. Up: many images at once are ready sooner. Down: less memory, and
    more of the processor for the engine."""
    kept_bytes: Limit = 64 * 1024 * 1024
    """Bytes of images, as the model is shown them, that need not be decoded again when they are shown again with the
    same `cache_salt`, as in the next turn of a conversation. Up: more of them. Down: less memory; 0 keeps none."""
    decode_timeout_s: Seconds = 10.0
    """How long decoding an image may take. Up: larger ones on a busy machine. Down: less time a stranger can claim."""
