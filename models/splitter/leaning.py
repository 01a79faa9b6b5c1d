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
        *("the previous answer", "the last one", "both", "that answer", "this result"),
    ),
    "say": (
        *("say", "put", "write", "translate", "rewrite", "turn", "convert", "explain", "repeat"),
        *("format", "summarise", "phrase", "give me", "present", "tell me", "express", "show"),
        *("rephrase", "reformulate", "retell", "render", "print", "spell out", "simplify"),
    ),
    "manner": (
        *("like a pirate", "in French", "as JSON", "in one sentence", "as a list", "in German"),
        *("more politely", "in upper case", "as an email", "into a table", "in simple words"),
        *("for a child", "in SQL", "as a poem", "in a formal tone", "like a robot", "in Spanish"),
        *("as bullet points", "into JSON", "in my own style", "as a haiku", "in capitals", "again"),
        *("step by step", "for my boss", "as a question", "in three words", "like Shakespeare"),
        *("in two lines", "as a tweet", "as code", "with emojis", "in markdown", "backwards"),
    ),
    "change": (
        *("shorter", "longer", "funnier", "more formal", "simpler", "sound friendlier", "rhyme"),
        *("polite", "clearer", "more detailed", "less formal", "bold", "lower case"),
    ),
    "number": ("2", "three", "10", "5", "half", "100", "7", "twelve"),
    "reckon": ("double", "halve", "square", "check", "round", "verify", "sort", "reverse", "count"),
    "who": (
        *("Anna", "my boss", "Leo", "the team", "her", "Tom", "my sister", "Mr Miller", "Priya"),
        *("the next one", "Berlin", "2021", "the blue one", "cats", "Monday", "users", "orders"),
    ),
}
_LEANING = (
    *("{say} {it} {manner}", "{say} {it} {manner} please", "now {say} {it} {manner}"),
    *("{say} {it} {manner}", "then {say} {it} {manner}", "can you {say} {it} {manner}"),
    *("do the same for {who}", "the same for {who}", "and for {who}", "same thing for {who}"),
    *("repeat this for {who}", "now for {who}", "what about {who}", "the same with {who}"),
    *("make {it} {change}", "make {it} {change} please", "could you make {it} {change}"),
    *("{reckon} {it}", "then {reckon} {it}", "add {number} to {it}", "multiply {it} by {number}"),
    *("send {it} to {who}", "email {it} to {who}", "mail {who} {it}", "write {who} about {it}"),
    *("why", "explain why", "how did you get {it}", "explain your answer", "are you sure"),
    *("which of {it} is best", "use {it} to answer {who}", "tell {who} {it}", "{manner} please"),
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
