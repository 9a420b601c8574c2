"""What is read where features are described."""

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light. And God saw the light, that it was good: and God divided the light from the darkness.",
    "The ship left the harbour at dawn. Waves broke over the bow, the sailors hauled the ropes, and the sea was grey.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # três, 三 🌊🌊\n",
    "The ship left the harbour at dawn. Nobody saw it again.",
    "Fry the onions in butter, add the tomatoes and the salt, and let the soup simmer for twenty minutes.",
]
SOURCES = ("King James Bible (public domain)", "written here")
