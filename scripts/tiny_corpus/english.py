"""English documents: stories, lists to recall, arithmetic, facts.

Each document introduces a hero, a friend, an object, a colour, a place at its start and needs them again much later: a
model that attends at a wrong distance, through a wrong mask or with wrong heads guesses instead of knowing.
"""

from __future__ import annotations

import random

from tiny_corpus.grammar import Cast, fill, mixed

BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Tim", "Dan", "Paul", "Peter")
GIRLS = ("Anna", "Lily", "Mia", "Lucy", "Emma", "Rose", "Kate", "Sara", "Nora", "Ella")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "silver", "golden")
THINGS = (
    "ball", "kite", "book", "cup", "hat", "box", "boat", "drum", "lamp", "key", "coat", "bell", "doll", "ring",
    "scarf", "bag", "clock", "bike", "map", "stone", "pen", "whistle", "blanket", "spoon",
)  # fmt: skip
PLACES = (
    "in the garden", "in the park", "in the forest", "in the kitchen", "at the school", "at the market",
    "in the library", "in the village", "on the farm", "at the beach", "by the river",
    "on the hill", "near the lake", "at the station",
)  # fmt: skip
SPOTS = (
    "under the bed", "behind the door", "in the basket", "on the shelf", "near the window", "under the table",
    "inside the cupboard", "behind the big tree", "under the bridge", "on the roof", "between two rocks",
    "in the tall grass",
)  # fmt: skip
ANIMALS = (
    "cat", "dog", "bird", "rabbit", "horse", "duck", "frog", "fox", "bear", "mouse", "sheep", "cow", "goat",
    "turtle",
)  # fmt: skip
SIZES = ("small", "big", "little", "young", "brave", "friendly", "quiet", "clever", "shy", "gentle")
FOODS = (
    "apples", "pears", "eggs", "cakes", "cookies", "nuts", "plums", "carrots", "candles", "shells", "flowers",
    "coins",
)  # fmt: skip
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "snowy", "cloudy", "bright")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
PRONOUNS = {True: ("he", "him", "his", "boy", "He"), False: ("she", "her", "her", "girl", "She")}

# Question and answer, both written by hand; used as facts in documents and in the chats.
FACTS = (
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What does a cow drink?", "A cow drinks water."),
    ("What does a cow give us?", "A cow gives us milk."),
    ("What does a bird have?", "A bird has two wings."),
    ("What does a cat say?", "A cat says meow."),
    ("What does a dog say?", "A dog says woof."),
    ("What does a duck say?", "A duck says quack."),
    ("Where do fish live?", "Fish live in the water."),
    ("Where do birds sleep?", "Birds sleep in a nest."),
    ("Where does a bear live?", "A bear lives in the forest."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("How many wheels does a bike have?", "A bike has two wheels."),
    ("When does the sun rise?", "The sun rises in the morning."),
    ("When can we see the stars?", "We can see the stars at night."),
    ("What comes after winter?", "Spring comes after winter."),
    ("What comes after summer?", "Autumn comes after summer."),
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of England?", "The capital of England is London."),
    ("What do bees make?", "Bees make honey."),
    ("What is ice made of?", "Ice is made of water."),
    ("What do we read?", "We read books."),
    ("What do we use an umbrella for?", "An umbrella keeps us dry in the rain."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("What does a doctor do?", "A doctor helps sick people."),
    ("What does a teacher do?", "A teacher helps children learn."),
    ("What does a farmer do?", "A farmer grows food in the fields."),
)

OPENINGS = (
    "One {weather} day, a {boy} named {hero} was {place}.",
    "Once upon a time, there was a {boy} named {hero}. One {weather} morning, {hero} was {place}.",
    "It was a {weather} {day}. {hero} was {place} with {his} friend {friend}.",
    "{hero} was a {size} {boy}. On {day}, {he} went out to play {place}.",
)
INTRODUCTIONS = (
    "{hero} had a {color} {thing} and a {size} {animal}.",
    "{He} loved {his} {color} {thing} very much. {His} best friend was a {size} {animal}.",
    "{He} carried a {color} {thing}. A {size} {animal} walked beside {him}.",
)
ENDINGS = (
    "In the evening, {hero} and {friend} went home together. They were tired but happy.",
    '"Thank you, {friend}," said {hero}. "You are my best friend." They smiled and went home.',
    "From that day on, {hero} and {friend} were good friends, and they often met {place}.",
    "{hero} told {his} mother about {friend}, the {animal} and the {color} {thing}. {His} mother was proud.",
    "That night, {hero} slept well. {He} dreamed of the {size} {animal} and the {color} {thing}.",
)
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # lost and found
        (
            "But the {color} {thing} was gone!",
            "Then {hero} could not find the {color} {thing}.",
            "Suddenly, the {thing} was lost.",
        ),
        (
            "{hero} was very sad and began to cry.",
            "{hero} looked everywhere, but it was not there.",
            '"Where is my {thing}?" asked {hero}.',
        ),
        (
            '"Do not worry," said {friend}. "I will help you look for your {thing}."',
            "{friend} heard {him} and came to help.",
        ),
        (
            "They looked {spot2}, but they only found a {color2} {thing2}.",
            "First they looked {spot2}. There was nothing but a {color2} {thing2}.",
        ),
        ("Then the {animal} ran ahead and stopped {spot}.", "At last, the {animal} made a loud sound. It was {spot}."),
        ("There it was! The {color} {thing} was {spot}.", "{friend} looked {spot} and saw the {color} {thing}."),
    ),
    (  # a gift
        (
            "{hero} met {friend}, who looked sad.",
            "{friend} was sitting alone {spot}.",
            "{hero} saw {friend} crying {spot}.",
        ),
        ('"Why are you sad?" asked {hero}.', '"What is wrong?" {hero} asked.'),
        ('"I lost my {color2} {thing2}," said {friend}.', '"My {color2} {thing2} is broken," said {friend}.'),
        (
            "{hero} thought for a while. Then {he} gave {friend} the {color} {thing}.",
            '"You can have my {color} {thing}," said {hero}.',
        ),
        (
            "{friend} smiled and said thank you. The {animal} was happy, too.",
            "{friend} took the {color} {thing} and laughed.",
        ),
        (
            "The next day, {friend} came back with {count2} {food} for {hero}.",
            "Later, {friend} brought {hero} {count2} {food}.",
        ),
    ),
    (  # helping an animal
        (
            "Suddenly, the {animal} ran away.",
            "Then the {animal} fell into the water.",
            "But the {animal} was hungry and tired.",
        ),
        ("{hero} was afraid. {He} called {friend} for help.", '"Help!" cried {hero}. {friend} came at once.'),
        ("They walked for a long time and called the {animal}.", "They asked everyone about the {size} {animal}."),
        ("In the end, they found the {animal} {spot}.", "{friend} saw the {animal} {spot}."),
        (
            "{hero} put the {color} {thing} on the ground, and the {animal} came closer.",
            "The {animal} saw the {color} {thing} and was not afraid any more.",
        ),
        (
            "They gave the {animal} {count2} {food}, and it ate them all.",
            "The {animal} was safe, and {hero} hugged it.",
        ),
    ),
    (  # a race
        ('"Let us have a race," said {friend}.', "{friend} wanted to see who was faster."),
        (
            '"If you win, I will give you my {color2} {thing2}," said {friend}.',
            "The winner would get a {color2} {thing2}.",
        ),
        (
            '"And if you win, you will get my {color} {thing}," said {hero}.',
            "{hero} put down the {color} {thing} and got ready.",
        ),
        (
            "They ran past the old house and over the bridge.",
            "They ran as fast as the wind. The {animal} ran behind them.",
        ),
        (
            "{hero} came first and got the {color2} {thing2}.",
            "{hero} won the race, so the {color2} {thing2} was {hispos} now.",
        ),
        ('"You are very fast!" said {friend}. They both laughed.', "{friend} was not angry. It was a good race."),
    ),
    (  # a secret
        ("{hero} found a {color2} {thing2} {spot}.", "There was a {color2} {thing2} {spot}, and {hero} picked it up."),
        ('"Whose {thing2} is this?" {hero} asked {friend}.', "{hero} showed the {thing2} to {friend}."),
        ('"I do not know," said {friend}. "Let us ask the {animal}."', '"It is not mine," said {friend}.'),
        ("They looked around and found {count} {food}.", "Next to it there were {count} {food}."),
        (
            "An old man came and said that the {color2} {thing2} was his.",
            "Then an old woman came. She had lost a {color2} {thing2}.",
        ),
        (
            "They gave it back at once, and they shared the {count} {food}.",
            "She was so glad that she gave {hero} and {friend} all {count} {food}.",
        ),
    ),
)
QUESTIONS = (
    ("What color was {hero}'s {thing}?", "{hero}'s {thing} was {color}."),
    ("Where was {hero}?", "{hero} was {place}."),
    ("Who was {hero}'s friend?", "{hero}'s friend was {friend}."),
    ("Which animal was with {hero}?", "A {size} {animal} was with {hero}."),
    ("Who had a {color} {thing}?", "{hero} had a {color} {thing}."),
    ("What did {hero} have?", "{hero} had a {color} {thing}."),
)


def cast(rng: random.Random, hero: str | None = None, friend: str | None = None) -> Cast:
    """Slots for one story; no two of its names, colours, objects and spots are the same."""
    names = rng.sample(BOYS + GIRLS, 2)
    hero, friend = hero or names[0], friend or names[1]
    he, him, his, boy, capital = PRONOUNS[hero in BOYS]
    colors, things, spots = rng.sample(COLORS, 2), rng.sample(THINGS, 2), rng.sample(SPOTS, 2)
    return {
        "hero": hero, "friend": friend, "he": he, "him": him, "his": his, "boy": boy, "He": capital,
        "His": his.capitalize(), "hispos": {"his": "his", "her": "hers"}[his],
        "color": colors[0], "color2": colors[1], "thing": things[0], "thing2": things[1],
        "spot": spots[0], "spot2": spots[1], "place": rng.choice(PLACES), "animal": rng.choice(ANIMALS),
        "size": rng.choice(SIZES), "food": rng.choice(FOODS), "weather": rng.choice(WEATHER), "day": rng.choice(DAYS),
        "count": NUMBERS[rng.randint(3, 12)], "count2": NUMBERS[rng.randint(2, 9)],
    }  # fmt: skip


def questions(rng: random.Random, slots: Cast, number: int) -> list[str]:
    return [
        f"Question: {question} Answer: {answer}".format_map(slots) for question, answer in rng.sample(QUESTIONS, number)
    ]


def tell(rng: random.Random, slots: Cast) -> str:
    """One story in one paragraph."""
    return " ".join(fill(rng, (OPENINGS, INTRODUCTIONS, *rng.choice(PLOTS), ENDINGS), slots))


def story(rng: random.Random) -> str:
    slots = cast(rng)
    return "\n".join([tell(rng, slots), *questions(rng, slots, rng.randint(0, 3))])


def long_story(rng: random.Random) -> str:
    """Several chapters about the same two friends, then questions about each: distances of several hundred tokens."""
    hero, friend = rng.sample(BOYS + GIRLS, 2)
    lines, asked = [f"The Story of {hero} and {friend}"], []
    chapters = rng.randint(2, 4)
    things = rng.sample(THINGS, 2 * chapters)
    for chapter, (thing, thing2) in enumerate(zip(things[::2], things[1::2], strict=True), start=1):
        slots = cast(rng, hero, friend) | {"thing": thing, "thing2": thing2}
        lines.append(f"Chapter {chapter}. {tell(rng, slots)}")
        asked.append((f"Question: What color was {hero}'s {thing}?", f"Answer: {hero}'s {thing} was {slots['color']}."))
        asked.append((f"Question: Where was {hero} in chapter {chapter}?", f"Answer: {hero} was {slots['place']}."))
    return "\n".join([*lines, *(" ".join(pair) for pair in rng.sample(asked, chapters))])


def recall(rng: random.Random) -> str:
    """Who has what and where it is: a list, then every entry asked for in another order."""
    number = rng.randint(3, 8)
    columns = (rng.sample(words, number) for words in (BOYS + GIRLS, COLORS, THINGS, SPOTS))
    rows = list(zip(*columns, strict=True))
    lines = [f"{name} has a {color} {thing}. It is {spot}." for name, color, thing, spot in rows]
    rng.shuffle(rows)
    for name, color, thing, spot in rows:
        question, answer = rng.choice(
            (
                (f"What does {name} have?", f"{name} has a {color} {thing}."),
                (f"Where is the {thing}?", f"The {thing} is {spot}."),
                (f"Who has the {thing}?", f"{name} has the {thing}."),
                (f"What color is the {thing}?", f"The {thing} is {color}."),
            )
        )
        lines.append(f"Question: {question} Answer: {answer}")
    return "\n".join(lines)


def apples(rng: random.Random) -> tuple[str, str, str]:
    """A word problem: (story, question, answer)."""
    name, other = rng.sample(BOYS + GIRLS, 2)
    food, a, b = rng.choice(FOODS), rng.randint(2, 10), rng.randint(1, 9)
    if rng.random() < 0.5 or b >= a:
        told = f"{name} has {NUMBERS[a]} {food}. {other} gives {name} {NUMBERS[b]} more."
        total = a + b
    else:
        told = f"{name} has {NUMBERS[a]} {food}. {name} gives {NUMBERS[b]} of them to {other}."
        total = a - b
    noun = food[:-1] if total == 1 else food
    return told, f"How many {food} does {name} have now?", f"{name} has {NUMBERS[total]} {noun} now."


def arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        kind = rng.randrange(4)
        if kind == 0:
            lines.append(f"{a} + {b} = {a + b}. {NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}.")
        elif kind == 1:
            a, b = max(a, b), min(a, b)
            lines.append(f"{a} - {b} = {a - b}. {NUMBERS[a].capitalize()} minus {NUMBERS[b]} is {NUMBERS[a - b]}.")
        elif kind == 2:
            start = rng.randint(0, 12)
            lines.append(f"Let us count: {', '.join(NUMBERS[start : start + rng.randint(5, 8)])}.")
        else:
            told, question, answer = apples(rng)
            lines.append(f"{told} {question} {answer}")
    return "\n".join(lines)


def facts(rng: random.Random) -> str:
    answers = [answer for _, answer in rng.sample(FACTS, rng.randint(4, 8))]
    for names, noun in ((DAYS, "day"), (MONTHS, "month")):
        if rng.random() < 0.4:
            start = rng.randrange(len(names))
            answers.append(f"The {noun} after {names[start]} is {names[(start + 1) % len(names)]}.")
    if rng.random() < 0.3:
        answers.append(f"The days of the week are {', '.join(DAYS[:-1])} and {DAYS[-1]}.")
    rng.shuffle(answers)
    return " ".join(answers)


write = mixed(((45, story), (15, long_story), (18, recall), (12, arithmetic), (10, facts)))
