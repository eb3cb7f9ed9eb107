"""From what a request shows to what an encoder reads of it, off the event loop."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from penstock.errors import ContextTooLong, InvalidImage, Overloaded
from penstock.images.config import ImageConfig
from penstock.images.data_url import decode_base64, split_data_url
from penstock.images.fetching import Fetcher
from penstock.images.kept import Became, KeptImages, name_of
from penstock.images.processor import Expansion, Prepared, Processor
from penstock.images.reading import Frames, Limits, Remark, check_sizes, read_frames, read_image, remarks_on
from penstock.images.shown import Shown
from penstock.protocol import Picture

_MOST_WAITING = 256
"""Images that wait for a worker."""
_LISTED_FRAMES_PER_S = 2.0
"""Of a video that is a list of frames, which does not say; it is what families that sample by time take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What became of it."""

    shown: Shown
    text: str
    """What takes the marker's place in the prompt"""
    pictures: tuple[Picture, ...]
    """Their offsets are not known yet"""
    remarks: tuple[Remark, ...]

    @property
    def num_tokens(self) -> int:
        """Placeholders of all its pictures."""
        return sum(picture.num_tokens for picture in self.pictures)


class ImageReader:
    """Has images fetched, decoded and prepared for a family's encoder, a bounded number at a time."""

    def __init__(self, processor: Processor, config: ImageConfig) -> None:
        self.processor = processor
        self.config = config
        self._limits = limits_of(config)
        self._fetcher = Fetcher(config)
        self._workers = ThreadPoolExecutor(config.workers, "penstock-images")
        self._num_waiting = 0
        self._kept = KeptImages(config.kept_bytes)

    async def read(self, shown: Sequence[Shown], most_tokens: int, salt: str = "") -> list[Seen]:
        """Return what became of each, together no more than ``most_tokens``.

        What was shown with the same ``salt`` before need not be decoded again. Raises the first ``InvalidImage`` or
        ``ContextTooLong``, naming its place, or ``Overloaded``.
        """
        if len(shown) > self.config.max_images:
            raise InvalidImage(
                f"there are {len(shown)} images; this server takes at most {self.config.max_images} in a request; "
                "show fewer, or have the operator raise images.max_images",
                param=shown[self.config.max_images].place,
            )
        num_tokens = 0

        async def read(one: Shown) -> Seen:
            # Not when all are there: what fits no prompt may be more than fits the memory.
            nonlocal num_tokens
            seen = await self._read(one, salt)
            num_tokens += seen.num_tokens
            if num_tokens > most_tokens:
                raise ContextTooLong(
                    f"{one.place}: with it images take {num_tokens} tokens, and a prompt has at most {most_tokens}; "
                    "show fewer or smaller ones",
                    param=one.place,
                )
            return seen

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(read(one)) for one in shown]
        except* (InvalidImage, ContextTooLong, Overloaded) as errors:
            failed = errors.exceptions[0]
        else:
            return [task.result() for task in tasks]
        raise failed

    async def _read(self, shown: Shown, salt: str) -> Seen:
        try:
            if shown.url[:5].lower() == "data:":
                return await self._work(lambda: self._found_or_prepared(shown, None, salt))
            if shown.is_video:
                raise InvalidImage("videos are not fetched; send it as a data: URL")
            data = await self._fetcher.fetch(shown.url)
            return await self._work(lambda: self._found_or_prepared(shown, data, salt))
        except InvalidImage as error:
            raise InvalidImage(f"{shown.place}: {error.message}", param=shown.place) from error

    async def _work(self, work: Callable[[], Seen]) -> Seen:
        if self._num_waiting >= _MOST_WAITING:
            raise Overloaded(f"{self._num_waiting} images wait to be read; retry in a moment", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        finally:
            self._num_waiting -= 1

    def _found_or_prepared(self, shown: Shown, data: bytes | None, salt: str) -> Seen:
        """Return what becomes of one whose bytes are ``data``, or in its URL. Blocks."""
        name = name_of(shown.url if data is None else data, salt, shown.detail, is_video=shown.is_video)
        became = self._kept.find(name)
        if became is None:
            became = self._prepare(shown, data)
            self._kept.keep(name, became)
        return Seen(shown=shown, text=became.text, pictures=became.pictures, remarks=became.remarks)

    def _prepare(self, shown: Shown, data: bytes | None) -> Became:
        if shown.is_video:
            frames = self._frames(*split_data_url(shown.url))
            return self._became(self.processor.video(frames.images, frames.frames_per_s), ())
        if data is None:
            data = decode_base64(split_data_url(shown.url)[1], self.config.max_bytes)
        image = read_image(data, self._limits)
        return self._became(self.processor.image(image, shown.detail), remarks_on(image))

    def _frames(self, media_type: str, payload: str) -> Frames:
        if self.processor.video_marker is None:
            raise InvalidImage("this model sees images and no videos; send single frames as images")
        if media_type != "video/jpeg":
            return read_frames(decode_base64(payload, self.config.max_bytes), self._limits)
        payloads = payload.split(",")
        if len(payloads) > self.config.max_frames:
            raise InvalidImage(
                f"it has {len(payloads)} frames, and at most {self.config.max_frames} are read; send fewer"
            )
        limits = Limits(
            max_pixels=self._limits.max_pixels // len(payloads),
            max_frames=1,
            timeout_s=self._limits.timeout_s / len(payloads),
        )
        images = []
        for number, one in enumerate(payloads, 1):
            try:
                images.append(read_image(decode_base64(one, self.config.max_bytes), limits))
            except InvalidImage as error:
                raise InvalidImage(f"frame {number} of {len(payloads)}: {error.message}") from error
        check_sizes(images)
        return Frames(images, _LISTED_FRAMES_PER_S)

    def _became(self, expansion: Expansion, remarks: tuple[Remark, ...]) -> Became:
        pictures = tuple(_picture(one, type(self.processor).__qualname__) for one in expansion.pictures)
        return Became(expansion.text, pictures, remarks)


def limits_of(config: ImageConfig) -> Limits:
    """Return what reading one image may cost."""
    return Limits(max_pixels=config.max_pixels, max_frames=config.max_frames, timeout_s=config.decode_timeout_s)


def _picture(prepared: Prepared, processor: str) -> Picture:
    """Return a picture that has no place yet, with a key of all that its features depend on."""
    frames, height, width, _ = prepared.pixels.shape
    shape = (frames, height, width)
    pixels = prepared.pixels.tobytes()
    about = (processor, shape, prepared.size, prepared.grid, prepared.time_step, prepared.num_tokens)
    digest = hashlib.blake2b(repr(about).encode(), digest_size=32)
    digest.update(pixels)
    return Picture(
        key=digest.digest(),
        offset=0,
        num_tokens=prepared.num_tokens,
        pixels=pixels,
        shape=shape,
        size=prepared.size,
        grid=prepared.grid,
        time_step=prepared.time_step,
    )
