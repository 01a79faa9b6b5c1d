"""Requests that need what came before them, and introductions that all requests need."""

from __future__ import annotations

import random
import re

from dlp_edge.models.training_texts.grammar_texts import from_grammar
from dlp_edge.models.training_texts.out_of_scope import OutOfScopeTexts

_SLOT = re.compile(r"{(\w+)}")
_WORDS = {
    "it": (
        *("that", "it", "this", "the result", "the answer", "the above", "your answer", "them"),
        *("what you wrote", "the text", "all of it", "the whole thing", "the output", "these"),
        *("the previous answer", "the last one", "both", "that answer", "this result", "that one"),
        *("it", "that", "this", "it", "that", "them", "those", "the first one", "your reply"),
    ),
    "say": (
        *("say", "put", "write", "translate", "rewrite", "turn", "convert", "explain", "repeat"),
        *("format", "summarise", "phrase", "give me", "present", "tell me", "express", "show"),
        *("rephrase", "reformulate", "retell", "render", "print", "spell out", "simplify", "wrap"),
        *("do", "list", "read", "spell", "describe", "reword", "word", "shorten", "polish", "make"),
    ),
    "reckon": (
        *("double", "halve", "square", "check", "round", "verify", "sort", "reverse", "count"),
        *("correct", "improve", "prove", "shorten", "total", "sum up", "average", "compare"),
        *("proofread", "expand", "undo", "save", "test", "sign", "finish", "continue", "rank"),
    ),
    "manner": (
        *("like a pirate", "in French", "as JSON", "in one sentence", "as a list", "in German"),
        *("more politely", "in upper case", "as an email", "into a table", "in simple words"),
        *("for a child", "in SQL", "as a poem", "in a formal tone", "like a robot", "in Spanish"),
        *("as bullet points", "into JSON", "in my own style", "as a haiku", "in capitals", "again"),
        *("step by step", "for my boss", "as a question", "in three words", "like Shakespeare"),
        *("in two lines", "as a tweet", "as code", "with emojis", "in markdown", "once more"),
        *("in pirate talk", "to Italian", "down to one line", "by date", "for a five year old"),
        *("with fewer words", "in plain English", "into Python", "in euros", "to two decimals"),
        *("as a story", "in metres", "with an example", "without the names", "in a table"),
    ),
    "change": (
        *("shorter", "longer", "funnier", "more formal", "simpler", "sound friendlier", "rhyme"),
        *("polite", "clearer", "more detailed", "less formal", "bold", "lower case", "a question"),
        *("a joke", "easier to read", "neutral", "sound angry", "two pages long", "negative"),
    ),
    "quality": (
        *("correct", "right", "the best", "bigger", "true", "the cheapest", "legal", "enough"),
        *("a prime number", "older", "more likely", "faster", "safe", "the most useful", "final"),
    ),
    "number": ("2", "three", "10", "5", "half", "100", "7", "twelve", "20", "one", "1.5"),
    "unit": (
        "euros",
        "minutes",
        "percent",
        "metres",
        "total",
        "hours",
        "French",
        "dollars",
        "feet",
    ),
    "part": (
        *("a greeting", "my name", "a title", "the date", "an example", "a joke", "a signature"),
        *("a last line", "my address", "the price", "a comma", "a PS", "two more", "a summary"),
    ),
    "who": (
        *("Anna", "my boss", "Leo", "the team", "her", "Tom", "my sister", "Mr Miller", "Priya"),
        *("the next one", "Berlin", "2021", "the blue one", "cats", "Monday", "users", "orders"),
        *("him", "them", "everyone", "my mother", "apples", "Rome", "next week", "the others"),
    ),
}
_LEANING = (
    *("{say} {it} {manner}", "{say} {it} {manner} please", "now {say} {it} {manner}"),
    *("{say} {it} {manner}", "then {say} {it} {manner}", "can you {say} {it} {manner}"),
    *("{say} {it} {manner}", "{say} {it} {manner} too", "{say} {it}", "also {say} {it} {manner}"),
    *("do the same for {who}", "the same for {who}", "and for {who}", "same thing for {who}"),
    *("repeat this for {who}", "now for {who}", "what about {who}", "the same with {who}"),
    *("now do {it} for {who}", "how about {who}", "give the same for {who}", "{who} too, please"),
    *("make {it} {change}", "make {it} {change} please", "could you make {it} {change}"),
    *("{reckon} {it}", "then {reckon} {it}", "add {number} to {it}", "multiply {it} by {number}"),
    *("please {reckon} {it}", "next, {reckon} {it} by {who}", "can you {reckon} {it} for {who}"),
    *("send {it} to {who}", "email {it} to {who}", "mail {who} {it}", "write {who} about {it}"),
    *("send {who} what you found", "reply to {who} that I agree", "tell {who} about {it}"),
    *("why", "explain why", "how did you get {it}", "explain your answer", "are you sure"),
    *("why is that", "explain the last step", "who said so", "how do you know", "and then what"),
    *("is {it} {quality}", "which one is {quality}", "which of {it} is {quality}", "is {it} so"),
    *("what is {it} in {unit}", "what would {it} be in {unit}", "how much is {it} in {unit}"),
    *("what is {number} percent of {it}", "and in {unit}", "how many {unit} is {it}"),
    *("add {part} to {it}", "add {part} at the end", "add {part} at the top", "leave out {part}"),
    *(
        "now without {part}",
        "again but with {number}",
        "once more but {manner}",
        "put {part} in {it}",
    ),
    *("use {it} to answer {who}", "tell {who} {it}", "{manner} please", "make a joke about {it}"),
    *("now {manner}", "{manner}", "the other way round", "divide {it} by {number}"),
    *("subtract {number} from {it}", "what is {it} plus {number}", "put {it} {manner}"),
)
_INTRODUCTIONS = (
    *("You are given this {kind}: {text}", "Here is a {kind}:\n{text}", "{Kind}:\n{text}"),
    *(
        "Given the following {kind}:\n\n{text}",
        "I have a {kind}: {text}",
        "This is my {kind}. {text}",
    ),
    *("Consider this {kind}:\n{text}", "Context: {text}", "Look at the {kind} below.\n{text}"),
    *('Take this {kind}: "{text}"', "We have this {kind}:\n```\n{text}\n```", "Background: {text}"),
    *("Read this {kind} first. {text}", "The {kind} is: {text}", "Use this {kind}: {text}"),
)
_KINDS = ("table", "text", "story", "list", "mail", "note", "passage", "record", "report", "letter")
_TABLES = ("books", "orders", "users", "films", "cars", "cities", "staff", "songs", "plants")
_COLUMNS = ("id", "name", "year", "price", "title", "author", "country", "size", "age", "date")


def draw_leaning(rng: random.Random) -> str:
    """A request that makes no sense without what came before."""
    text = _SLOT.sub(lambda slot: rng.choice(_WORDS[slot[1]]), rng.choice(_LEANING))
    end = rng.choice((".", "", "?", "!", "."))
    return (text if rng.random() < 0.5 else text[:1].upper() + text[1:]) + end


def draw_introduction(others: OutOfScopeTexts, rng: random.Random) -> str:
    """Something given, which the requests after it are about."""
    draw = rng.random()
    if draw < 0.3:
        columns = ", ".join(rng.sample(_COLUMNS, rng.randint(2, 5)))
        kind, text = "table", f"{rng.choice(_TABLES)}({columns})"
    elif draw < 0.6:
        kind, text = rng.choice(_KINDS), from_grammar("records", rng)
    else:
        count = rng.randint(1, 5)
        text = " ".join(from_grammar("sentences", rng) for _ in range(count))
        kind = rng.choice(_KINDS)
    form = rng.choice(_INTRODUCTIONS)
    return form.format(kind=kind, Kind=kind.capitalize(), text=text.strip())
