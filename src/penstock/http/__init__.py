"""What every HTTP surface shares: the error table, server-sent events, middleware."""
