"""What the server says of itself when it is ready."""

import pytest

from penstock.launch.server import url_of


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("box.example", "http://box.example:80"),
    ],
)
def test_its_url_can_be_copied(host: str, url: str) -> None:
    assert url_of(host, 80) == url
