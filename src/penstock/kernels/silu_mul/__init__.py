"""The gated activation of feed-forward blocks."""
