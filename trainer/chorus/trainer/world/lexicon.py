"""The words of the small world: every name, city, thing and number word its texts are made of.

The lists are closed on purpose: a 3M-parameter model can know all of them well, while their
combinations (names x cities x things x counts x phrasings) are far too many to memorise, so a held-out
prompt is a real question. This module knows words only; `messages`, `skills` and `stories` make text.
"""

from typing import Final

NAMES: Final[tuple[str, ...]] = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas",
    "Karin", "Leo", "Maria", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor",
    "Alice", "Boris", "Celia", "Diego", "Elena", "Frank", "Greta", "Henry", "Irene", "Jack",
    "Laura", "Marco", "Nora", "Oscar", "Peter", "Ruth", "Sara", "Tom", "Vera", "Walter",
)  # fmt: skip

#: city -> country
CITIES: Final[dict[str, str]] = {
    "Oslo": "Norway", "Bergen": "Norway", "Rome": "Italy", "Milan": "Italy",
    "Paris": "France", "Lyon": "France", "Berlin": "Germany", "Hamburg": "Germany",
    "Madrid": "Spain", "Seville": "Spain", "Lisbon": "Portugal", "Porto": "Portugal",
    "Dublin": "Ireland", "Cork": "Ireland", "London": "England", "Leeds": "England",
    "Vienna": "Austria", "Graz": "Austria", "Prague": "Czechia", "Brno": "Czechia",
    "Athens": "Greece", "Patras": "Greece", "Warsaw": "Poland", "Gdansk": "Poland",
}  # fmt: skip

#: thing -> its plural
ITEMS: Final[dict[str, str]] = {
    "lamp": "lamps", "cup": "cups", "chair": "chairs", "table": "tables", "book": "books",
    "pen": "pens", "clock": "clocks", "mirror": "mirrors", "pillow": "pillows", "basket": "baskets",
    "kettle": "kettles", "blanket": "blankets", "candle": "candles", "plate": "plates",
    "spoon": "spoons", "knife": "knives", "shelf": "shelves", "glass": "glasses",
    "brush": "brushes", "box": "boxes", "bag": "bags", "coat": "coats", "hat": "hats",
    "shirt": "shirts", "radio": "radios", "camera": "cameras", "bottle": "bottles",
    "ladder": "ladders", "hammer": "hammers", "rope": "ropes",
}  # fmt: skip

COLOURS: Final[tuple[str, ...]] = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "grey",
)  # fmt: skip

JOBS: Final[tuple[str, ...]] = (
    "baker", "teacher", "doctor", "farmer", "painter", "sailor", "driver", "cook",
    "gardener", "nurse", "writer", "singer",
)  # fmt: skip

SHOPS: Final[tuple[str, ...]] = (
    "bakery", "library", "market", "museum", "pharmacy", "station", "garden", "theatre",
)  # fmt: skip

ANIMALS: Final[tuple[str, ...]] = ("dog", "cat", "horse", "bird", "goat", "duck")

WEATHER: Final[tuple[str, ...]] = ("sunny", "rainy", "windy", "cold", "warm", "foggy")

MONTHS: Final[tuple[str, ...]] = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

DAYS: Final[tuple[str, ...]] = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip

CITY_LIST: Final[tuple[str, ...]] = tuple(CITIES)
ITEM_LIST: Final[tuple[str, ...]] = tuple(ITEMS)
