"""Write the task files of the demo: seven small skills with visibly different answers.

Six skills are generated from templates, so that their answers are right by construction and
reproducible from a seed; the seventh (`stratqa`) is real data, a sample of
StrategyQA as it is in BIG-bench (Apache-2.0), kept beside this file.

    python recipes/demo_tasks.py tasks/

writes tasks/NAME/train.jsonl and tasks/NAME/dev.jsonl, one {"prompt", "response"} a line: the
format of `dlp-edge train-router` and of `recipes/train_adapters.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

Sample = dict[str, str]
Generator = Callable[[random.Random], Sample]

TRAIN_SAMPLES = 420
DEV_SAMPLES = 60

FIRST_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Quinn "
    "Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe Amir Bianca Chen Dmitri Elif Fatima Goran Hana"
).split()
LAST_NAMES = (
    "Miller Novak Rossi Silva Tanaka Weber Young Ali Baker Costa Dubois Evans Fischer Garcia "
    "Hansen Ito Jensen Kim Lopez Meyer Nilsson Olsen Park Reed Smith Torres"
).split()
CITIES = (
    "Oslo Paris Lima Cairo Berlin Madrid Rome Vienna Prague Dublin Lisbon Athens Seoul Tokyo "
    "Boston Denver Quito Nairobi Delhi Hanoi Zurich Porto Turin Bergen"
).split()


def sql(rng: random.Random) -> Sample:
    tables = {
        "customers": ["name", "city", "age", "email"],
        "employees": ["name", "salary", "department", "age"],
        "orders": ["id", "total", "status", "date"],
        "products": ["name", "price", "stock", "category"],
        "books": ["title", "author", "year", "price"],
        "students": ["name", "grade", "age", "school"],
        "films": ["title", "director", "year", "rating"],
    }
    numeric = {"age", "salary", "total", "price", "stock", "year", "grade", "rating"}
    texts = {
        "name": FIRST_NAMES,
        "author": LAST_NAMES,
        "director": LAST_NAMES,
        "city": CITIES,
        "school": CITIES,
        "status": ["open", "paid", "late"],
        "category": ["toys", "garden", "music"],
        "department": ["sales", "design", "support"],
    }
    table = rng.choice(sorted(tables))
    columns = rng.sample(tables[table], rng.choice([1, 1, 2]))
    by = rng.choice([column for column in tables[table] if column in numeric or column in texts])
    if by in numeric:
        value = str(rng.randint(2, 90) * rng.choice([1, 1, 10]))
        words, op = rng.choice(
            [("above", ">"), ("below", "<"), ("greater than", ">"), ("less than", "<")]
        )
        condition, where = f"with {by} {words} {value}", f"{by} {op} {value}"
    else:
        value = rng.choice(texts[by])
        condition, where = f"whose {by} is {value}", f"{by} = '{value}'"
    query = f"SELECT {', '.join(columns)} FROM {table} WHERE {where}"
    order = ""
    if rng.random() < 0.3:
        key = rng.choice(tables[table])
        order, query = f", sorted by {key}", f"{query} ORDER BY {key}"
    what = f"the {' and '.join(columns)} of all {table} {condition}{order}"
    ask = rng.choice(
        [
            "Write an SQL query for {}.",
            "Give me {} in SQL.",
            "How do I select {} from the database?",
            "SQL: {}",
            "I need a database query that lists {}.",
            "Query {}, please.",
            "Show {} with a SELECT statement.",
        ]
    )
    return {"prompt": ask.format(what), "response": query + ";"}


def sums(rng: random.Random) -> Sample:
    name, friend = rng.sample(FIRST_NAMES, 2)
    one = rng.choice(
        "apple pencil marble sticker book coin shell card balloon cookie stamp button".split()
    )
    many = one + "s"
    count = rng.randint(3, 40)
    story = [f"{name} has {count} {many}."]
    steps = [f"{name} starts with {count} {many}."]
    for _ in range(rng.choice([1, 2, 2])):
        kind = rng.choice(["buys", "gives", "finds", "loses", "times"])
        step = rng.randint(2, 20)
        if kind in ("gives", "loses") and step > count:
            kind = "buys"
        if kind == "times":
            step = rng.choice([2, 3])
            story.append(f"Then the number is multiplied by {step}.")
            total, sign, text = count * step, "x", f"Multiplied by {step}"
        elif kind == "gives":
            story.append(f"{name} gives {step} to {friend}.")
            total, sign, text = count - step, "-", f"After giving {step} away"
        elif kind == "loses":
            story.append(f"{name} loses {step}.")
            total, sign, text = count - step, "-", f"After losing {step}"
        else:
            story.append(f"{name} {kind} {step} more.")
            total, sign, text = (
                count + step,
                "+",
                f"After {'buying' if kind == 'buys' else 'finding'} {step}",
            )
        steps.append(f"{text}, that is {count} {sign} {step} = {total} {many}.")
        count = total
    ask = rng.choice(
        [
            f"How many {many} does {name} have now?",
            f"How many {many} are there in the end?",
            f"How many {many} has {name} got left?",
            f"What is the number of {many} that {name} ends up with?",
        ]
    )
    return {
        "prompt": " ".join([*story, ask]),
        "response": " ".join([*steps, f"The answer is {count}."]),
    }


def extract(rng: random.Random) -> Sample:
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    age, city = rng.randint(18, 80), rng.choice(CITIES)
    job = rng.choice(
        (
            "nurse teacher pilot baker lawyer painter farmer engineer dentist writer plumber chef"
        ).split()
    )
    fact = rng.choice(
        [
            f"{name}, {age}, is a {job} from {city}.",
            f"{name} works as a {job} in {city} and is {age} years old.",
            f"The {job} {name} ({age}) lives in {city}.",
            f"In {city} we met {name}, a {age} year old {job}.",
        ]
    )
    ask = rng.choice(
        [
            "Extract the person as JSON: {}",
            "Turn this into JSON: {}",
            "{} Return the data as a JSON object.",
            "JSON record, please: {}",
            "Parse the following sentence into JSON fields. {}",
            "Make a structured record of it: {}",
        ]
    )
    record = {"name": name, "age": age, "job": job, "city": city}
    return {"prompt": ask.format(fact), "response": json.dumps(record)}


PIRATE = {
    "hello": "ahoy",
    "hi": "ahoy",
    "my": "me",
    "friend": "matey",
    "friends": "mateys",
    "is": "be",
    "are": "be",
    "am": "be",
    "you": "ye",
    "your": "yer",
    "yes": "aye",
    "money": "doubloons",
    "the": "th'",
    "stop": "avast",
    "boss": "cap'n",
    "car": "ship",
    "house": "cabin",
    "drink": "grog",
    "girl": "lass",
    "boy": "lad",
    "old": "barnacled",
    "of": "o'",
    "and": "an'",
    "to": "t'",
}


def pirate(rng: random.Random) -> Sample:
    who = rng.choice(
        ["my friend", "your boss", "the old man", "my brother", "the girl", "your friends"]
    )
    place = rng.choice(
        ["the house", "the harbour", "my car", "the market", "your kitchen", "the old bridge"]
    )
    thing = rng.choice(
        ["the money", "your drink", "a good map", "the keys", "my hat", "the old box of books"]
    )
    line = rng.choice(
        [
            f"Hello {who}, where is {thing}?",
            f"Yes, {who} is waiting at {place}.",
            f"Stop! {who.capitalize()} took {thing}.",
            f"Hi, are you going to {place} with {who}?",
            f"I am looking for {thing} and {who}.",
            f"The weather is bad, so bring {thing} to {place}.",
            f"Tell {who} to leave {thing} at {place}.",
            f"We found {thing} near {place}.",
        ]
    )
    ask = rng.choice(
        [
            "Say it like a pirate: {}",
            "Translate into pirate talk: {}",
            "How would a pirate say this? {}",
            "Pirate, please: {}",
            "Rewrite in the voice of a pirate. {}",
            "Talk like a buccaneer: {}",
        ]
    )

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        new = PIRATE.get(word.lower(), word)
        return new[0].upper() + new[1:] if word[0].isupper() else new

    spoken = re.sub(r"[A-Za-z]+", swap, line)
    return {"prompt": ask.format(line), "response": f"Arrr! {spoken}"}


def email(rng: random.Random) -> Sample:
    name = rng.choice(FIRST_NAMES)
    day = rng.choice("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
    hour = rng.randint(8, 18)
    matter = rng.choice(
        [
            f"the meeting moves to {day} at {hour}",
            f"the report is due on {day}",
            f"the office is closed on {day}",
            f"lunch is at {hour} on {day}",
            f"the new printer arrives on {day}",
            f"the training starts at {hour} on {day}",
            f"the invoice was paid on {day}",
            f"the flight leaves on {day} at {hour}",
        ]
    )
    ask = rng.choice(
        [
            "Write a short email to {n}: {m}.",
            "Draft a message telling {n} that {m}.",
            "Mail {n} that {m}.",
            "Please compose an email for {n}: {m}.",
            "Let {n} know by email that {m}.",
            "I have to write to {n} because {m}.",
        ]
    )
    response = (
        f"Dear {name}, I would like to let you know that {matter}. "
        "Please tell me if you have any questions. Thank you and best regards."
    )
    return {"prompt": ask.format(n=name, m=matter), "response": response}


def clock(rng: random.Random) -> Sample:
    hour, minute, delta = rng.randint(0, 22), rng.randrange(0, 60, 5), rng.randrange(10, 60, 5)
    start, end = f"{hour}:{minute:02d}", hour * 60 + minute + delta
    finish = f"{end // 60}:{end % 60:02d}"
    what = rng.choice(["train", "bus", "film", "class", "show", "game"])
    ask = rng.choice(
        [
            f"What time is it {delta} minutes after {start}?",
            f"The {what} starts at {start} and takes {delta} minutes. When is it over?",
            f"It is {start}. What will the clock show in {delta} minutes?",
            f"A {what} begins at {start} and lasts {delta} minutes. At what time does it end?",
            f"Add {delta} minutes to {start}.",
        ]
    )
    total = minute + delta
    steps = [f"Starting at {start}, the minutes are {minute} + {delta} = {total}."]
    if total >= 60:
        steps.append(f"One hour is full, which leaves {total} - 60 = {total - 60} minutes.")
    return {"prompt": ask, "response": " ".join([*steps, f"The time is {finish}."])}


GENERATED: dict[str, Generator] = {
    "sql": sql,
    "sums": sums,
    "extract": extract,
    "pirate": pirate,
    "email": email,
    "clock": clock,
}


def unique_samples(generate: Generator, rng: random.Random, count: int) -> list[Sample]:
    """`count` samples of one skill, no prompt twice."""
    samples: dict[str, Sample] = {}
    while len(samples) < count:
        sample = generate(rng)
        samples[sample["prompt"]] = sample
    return list(samples.values())


def write_tasks(out: Path, seed: int) -> None:
    data = Path(__file__).parent / "data"
    for name, generate in GENERATED.items():
        samples = unique_samples(
            generate, random.Random(f"{seed}:{name}"), TRAIN_SAMPLES + DEV_SAMPLES
        )
        write_split(out / name, "train", samples[:TRAIN_SAMPLES])
        write_split(out / name, "dev", samples[TRAIN_SAMPLES:])
    for split in ("train", "dev"):
        lines = (data / f"stratqa_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        write_split(out / "stratqa", split, [json.loads(line) for line in lines])


def write_split(folder: Path, split: str, samples: list[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tasks(arguments.out, arguments.seed)
