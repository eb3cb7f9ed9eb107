"""What all commands are, as typer makes them."""

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose usage names what is required as it is typed, without braces."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the parts of the usage line behind the command's name."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]
