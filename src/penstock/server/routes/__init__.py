"""Each module adds the routes of one subject to the application."""
