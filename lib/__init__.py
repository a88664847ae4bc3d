"""The rooms of the program. Each imports only from those before it; ``tests/test_rooms.py`` reads this list."""

ROOMS = (
    "errors",
    "seeding",
    "session",
    "config",
    "distributed",
    "method",
    "data",
    "evaluation",
    "training",
    "reporting",
)
