"""What encoding takes grows with what is at once, and with nothing else."""

from dataclasses import replace

from penstock.estimate.seeing import TowerShape, encoding_peak_bytes

SHAPE = TowerShape(width=64, num_heads=4, mlp_width=256, patch_size=14, projector_width=128)
PATCH = 3 * 14 * 14


def peak(shape: TowerShape = SHAPE, *, num_patches: int = 4096, num_tiles: int = 1, rows_at_once: int = 1024) -> int:
    return encoding_peak_bytes(
        shape, image_bytes=num_patches * PATCH, num_tiles=num_tiles, rows_at_once=rows_at_once, element_bytes=4
    )


def test_the_largest_images_rows_keys_and_values_are_held() -> None:
    assert peak(num_patches=8192) - peak() >= 4096 * (4 * 64 * 4 + PATCH)
    assert peak(num_patches=1) == peak(num_patches=1023), "small ones go together"


def test_only_a_part_has_the_widest_moment() -> None:
    wide = replace(SHAPE, mlp_width=1024)
    assert peak(wide, num_patches=8192) - peak(num_patches=8192) == peak(wide) - peak() > 0
    assert peak(rows_at_once=512) < peak()


def test_tiles_take_what_becomes_of_them() -> None:
    more = peak(num_tiles=5) - peak()
    assert 4 * 4096 * (PATCH + 4 * 64) < more < 4 * peak()
