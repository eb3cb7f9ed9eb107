"""From what a request shows to pictures."""

import asyncio
import threading
from typing import Any

import pytest
from PIL.Image import Image

from penstock.errors import ContextTooLong, InvalidImage, Overloaded
from penstock.images.config import ImageConfig
from penstock.images.processor import Expansion
from penstock.images.reader import ImageReader
from penstock.images.shown import Detail, Shown
from tests.fakes.vision import FakeProcessor
from tests.images.files import animated, data_url, drawing, encoded

MOST = 10_000
URL = data_url(encoded(drawing()))
GIF = data_url(animated("GIF", ["red", "lime", "blue"], duration_ms=500), "image/gif")


def shown(url: str = URL, place: str = "here", **more: Any) -> Shown:
    return Shown(place=place, url=url, **more)


def frames_url(*colours_or_sizes: tuple[int, int]) -> str:
    files = [data_url(encoded(drawing(*size), "JPEG")).partition(",")[2] for size in colours_or_sizes]
    return f"data:video/jpeg;base64,{','.join(files)}"


async def test_images_become_pictures() -> None:
    reader = ImageReader(FakeProcessor(), ImageConfig())
    low, high, video = await reader.read(
        [shown(URL.replace("data:", "Data:")), shown(detail="high"), shown(GIF, is_video=True)], MOST
    )
    assert low.text == f"[{'<image>' * 4}]"
    (picture,) = low.pictures
    assert (picture.num_tokens, picture.shape, picture.size) == (4, (1, 16, 16), (48, 64))
    assert len(picture.pixels) == 16 * 16 * 3
    assert [one.num_tokens for one in high.pictures] == [4, 3]
    assert high.pictures[0] == picture
    assert high.pictures[1].key != picture.key
    assert video.text == f"({'<frame>' * 6})"
    assert video.pictures[0].shape == (3, 16, 16)


async def test_keys_are_of_all_that_features_depend_on() -> None:
    reader = ImageReader(FakeProcessor(), ImageConfig())

    async def key(image: Image, kind: str = "PNG", of: ImageReader = reader, **options: Any) -> bytes:
        (seen,) = await of.read([shown(data_url(encoded(image, kind, **options)))], MOST)
        return seen.pictures[0].key

    class Other(FakeProcessor):
        pass

    image = drawing()
    assert await key(image) == await key(image, "WEBP", lossless=True)
    changed = drawing()
    changed.paste("black", (0, 0, 9, 9))
    others = [
        await key(changed),
        await key(image.resize((128, 96))),
        await key(image, of=ImageReader(Other(), ImageConfig())),
    ]
    assert len({await key(image), *others}) == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (shown("data:image/png;base64,AAAA"), "it is no image that is known"),
        (shown("data:image/png,AAAA"), "a data: URL of an image is"),
        (shown("data:image/png;base64,"), "it is empty; send the file's bytes"),
        (shown(data_url(encoded(drawing())[:100])), "is cut off after"),
        (shown("http://example.com/a.png"), "or have the operator name its host in images.allowed_hosts"),
        (shown("a.png"), "its URL must be data:"),
        (shown("http://example.com/a.gif", is_video=True), "videos are not fetched"),
        (
            shown("data:video/mp4;base64,AAAAGGZ0eXBpc29t", is_video=True),
            "it is MP4; this server reads PNG, JPEG, WebP, GIF: take frames from it first",
        ),
        (shown(frames_url((64, 48), (48, 64)), is_video=True), "frame 2 of 2 is 48x64 and the first is 64x48"),
        (
            shown(f"{frames_url((64, 48))},{frames_url((64, 48)).partition(',')[2][:400]}", is_video=True),
            "frame 2 of 2: it is a JPEG that is cut off after 300 bytes",
        ),
        (shown(frames_url(*[(8, 8)] * 130), is_video=True), "it has 130 frames, and at most 128 are read; send fewer"),
    ],
)
async def test_the_place_is_named(bad: Shown, message: str) -> None:
    with pytest.raises(InvalidImage) as refused:
        await ImageReader(FakeProcessor(), ImageConfig()).read([shown(place="first"), bad], MOST)
    assert refused.value.param == "here"
    assert refused.value.message.startswith("here: ")
    assert message in refused.value.message


async def test_frames_as_a_list() -> None:
    processor = FakeProcessor()
    (seen,) = await ImageReader(processor, ImageConfig()).read(
        [shown(frames_url(*[(64, 48)] * 3), is_video=True)], MOST
    )
    assert seen.pictures[0].shape == (3, 16, 16)
    assert [image.size for image in processor.seen] == [(64, 48)] * 3


async def test_limits() -> None:
    reader = ImageReader(FakeProcessor(), ImageConfig(max_images=2, max_bytes=100))
    with pytest.raises(InvalidImage, match="there are 3 images; this server takes at most 2") as refused:
        await reader.read([shown(place=f"place {i}") for i in range(3)], MOST)
    assert refused.value.param == "place 2"
    with pytest.raises(InvalidImage, match="at most 100 are read"):
        await reader.read([shown()], MOST)


async def test_images_that_fit_no_prompt_are_not_all_read() -> None:
    processor = FakeProcessor()
    reader = ImageReader(processor, ImageConfig(workers=1))
    assert len(await reader.read([shown()] * 5, 20)) == 5
    with pytest.raises(ContextTooLong, match="images take 24 tokens, and a prompt has at most 20") as refused:
        await reader.read([shown(place=f"place {i}") for i in range(32)], 20)
    assert refused.value.param == "place 5"
    assert len(processor.seen) < 5 + 32


async def test_an_image_is_decoded_once_for_each_salt_and_detail() -> None:
    processor = FakeProcessor()
    reader = ImageReader(processor, ImageConfig(kept_bytes=4 * 16 * 16 * 3))
    (first,) = await reader.read([shown()], MOST)
    (again,) = await reader.read([shown(place="there")], MOST)
    assert len(processor.seen) == 1
    assert (again.pictures, again.text, again.shown.place) == (first.pictures, first.text, "there")
    await reader.read([shown()], MOST, "blue")
    await reader.read([shown(detail="high")], MOST)
    assert len(processor.seen) == 3
    await reader.read([shown()], MOST, "blue")
    await reader.read([shown(detail="high")], MOST)
    assert len(processor.seen) == 3
    await reader.read([shown()], MOST)
    assert len(processor.seen) == 4, "it was given up for the others"
    none = ImageReader(processor, ImageConfig(kept_bytes=0))
    assert await none.read([shown()], MOST) == await none.read([shown()], MOST) == [first]
    assert len(processor.seen) == 6


async def test_a_family_without_videos_says_so() -> None:
    processor = FakeProcessor()
    processor.video_marker = processor.video_placeholder = None
    with pytest.raises(InvalidImage, match="sees images and no videos"):
        await ImageReader(processor, ImageConfig()).read([shown(GIF, is_video=True)], MOST)


async def test_remarks_come_with_images() -> None:
    (seen,) = await ImageReader(FakeProcessor(), ImageConfig()).read([shown(data_url(encoded(drawing(9, 64))))], MOST)
    assert [remark.code for remark in seen.remarks] == ["image_small"]


async def test_the_loop_goes_on_meanwhile_and_workers_are_bounded() -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    num_at_once, most_at_once = 0, 0
    lock = threading.Lock()

    class Patient(FakeProcessor):
        def image(self, image: Image, detail: Detail) -> Expansion:
            nonlocal num_at_once, most_at_once
            with lock:
                num_at_once += 1
                most_at_once = max(most_at_once, num_at_once)
            begun.release()
            assert go_on.wait(30)
            with lock:
                num_at_once -= 1
            return super().image(image, detail)

    reader = ImageReader(Patient(), ImageConfig(workers=2, max_images=300))
    reading = asyncio.create_task(reader.read([shown()] * 256, MOST))
    await asyncio.to_thread(lambda: (begun.acquire(timeout=30), begun.acquire(timeout=30)))
    with pytest.raises(Overloaded, match="256 images wait") as refused:
        await reader.read([shown()], MOST)
    assert refused.value.retry_after_s
    go_on.set()
    assert len(await reading) == 256
    assert most_at_once == 2
    assert len(await reader.read([shown()], MOST)) == 1
