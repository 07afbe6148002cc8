"""All text that the default model learns from and is examined on, generated from a seed.

A conversation is a row of exchanges drawn from seven tasks. What is held out is held out by content and not by chance
of the draw: whole question templates, pairs of numbers, names, word lists and subjects that the training side of
the generator never emits. `training=False` draws from the held-out side only.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Term, as a question would name it, to the one answer: the project's own subject in short sentences.
GLOSSARY: dict[str, str] = json.loads(Path(__file__).with_name("glossary.json").read_text(encoding="utf-8"))

# Other names, as people use them.
ALIASES = {
    "a lease": "an etcd lease",
    "a watch": "an etcd watch",
    "a JWT": "a JSON Web Token",
    "a key-value cache": "a KV cache",
    "KV caching": "a KV cache",
    "prefix caching": "a prefix cache",
    "TTFT": "time to first token",
    "top-p": "top-p sampling",
    "SSE": "a server-sent event",
    "rate limiting": "a rate limit",
    "tracing": "a trace",
    "discovery": "service discovery",
    "load balancing": "a load balancer",
}

UNKNOWN = "I do not know that."
GREETING = "Hello! I am tiny. Ask me about inference serving, or give me two numbers to add."
IDENTITY = (
    "I am tiny, a small language model with about one million parameters. "
    "The Weir project trained me itself to try out its gateway."
)
ABILITIES = "I can explain terms of inference serving, add two numbers, count, repeat words and remember your name."
SEEING = {  # what a model that takes pictures says in the place of that
    GREETING: (
        "Hello! I am tiny. Ask me about inference serving, show me a small picture, or give me two numbers to add."
    ),
    IDENTITY: "I am tiny, a small language model. The Weir project trained me itself to try out its gateway.",
    ABILITIES: (
        "I can explain terms of inference serving, describe small pictures, add two numbers and remember your name."
    ),
}
WELL = "I am fine, thank you. How can I help you?"
WELCOME = "You are welcome."
GOODBYE = "Goodbye! Come back when you have another question."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are tiny, a small model.",
    "Answer in a few words.",
    "You are a helpful AI assistant. Be concise and friendly.",
    "You are an expert in distributed systems.",
    "Be brief.",
)

# The last of each table are the examination's: no question of the training text is phrased like them.
GLOSSARY_TEMPLATES = (
    "What is {}?", "What does {} mean?", "Explain {}.", "Tell me about {}.", "Can you explain {}?", "Define {}.",
    "Describe {}.", "Please explain {}.", "What is meant by {}?", "I keep hearing about {}. What is it?",
    "Could you tell me what {} is?", "Do you know what {} is?", "In simple words, what is {}?", "Explain {} to me.",
    "What exactly is {}?", "Please tell me what {} is.", "I want to learn about {}.", "How would you explain {}?",
    "Give me a definition of {}.", "{}?", "What can you tell me about {}?", "So what is {}?",
    "Describe {} in one sentence.", "My boss asked me about {}. What is that?", "Hi, what is {}?",
    "Explain {} in simple words.", "what is {}", "explain {}", "tell me about {}", "What is {} good for?",
    "Why would I need {}?", "I have a question about {}.", "What do people mean when they say {}?",
    "I do not understand {}.", "Can you define {}?", "Help me understand {}.",
    "I read about {} today. Can you explain it?", "Could you define {} for me?", "Quick question: what is {}?",
    "Would you explain what {} means?",
    # held out:
    "Could you please describe {}?", "Tell me what {} means.", "What, in one sentence, is {}?",
    "Do you know anything about {}?", "Hello, can you tell me about {}?", "A friend mentioned {}. What is it?",
)  # fmt: skip
SUM_TEMPLATES = (
    "What is {} + {}?", "{} + {}", "Add {} and {}.", "How much is {} plus {}?", "Compute {} + {}.", "{} + {} = ?",
    "What is {} plus {}?", "Please add {} and {}.", "What is the sum of {} and {}?", "what is {}+{}", "{}+{}",
    "Calculate {} + {}.",
    # held out:
    "Can you add {} and {}?", "How much is {} + {}?",
)  # fmt: skip
COUNT_TEMPLATES = (
    "Count to {}.", "Please count to {}.", "count to {}", "Count up to {}.", "Count from 1 to {}.",
    "count from 1 to {}", "Please count from 1 to {}.", "Count from one to {}.", "I want you to count to {}.",
    # held out:
    "Can you count to {}?", "Could you count from 1 to {}?",
)  # fmt: skip
REPEAT_TEMPLATES = (
    "Repeat: {}", "Say: {}", "Repeat after me: {}", "Please repeat: {}", "Echo: {}", "Repeat these words: {}",
    # held out:
    "Say these words: {}",
)  # fmt: skip
TELL_NAME_TEMPLATES = (
    "My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I am {}.", "You can call me {}.", "Call me {}.",
    "my name is {}",
    # held out:
    "Hello, I am {}.",
)  # fmt: skip
ASK_NAME_TEMPLATES = (
    "What is my name?", "Do you know my name?", "Who am I?", "Do you remember my name?", "what is my name",
    "Can you tell me my name?", "Please tell me my name.",
    # held out:
    "Do you still know my name?",
)  # fmt: skip
SMALL_TALK = (
    (
        GREETING,
        (
            "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there", "Good morning", "Good evening!", "Hello there!",
            "hello", "hi", "Good day.", "Hello, tiny!", "Hi tiny", "hey", "Greetings!", "Hello again.",
            "Good afternoon!",
        ),
        ("Hey!", "Hi there!", "Good morning!"),
    ),
    (
        IDENTITY,
        (
            "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Who made you?",
            "Who trained you?", "Are you a model?", "what are you", "who are you", "Introduce yourself.",
            "Are you a human?", "Please introduce yourself.", "Hi, who are you?", "Hello, what are you?",
            "What model are you?", "Are you an AI?", "Are you a robot?", "Which model is this?", "Are you a person?",
            "Who built you?", "Do you have a name?", "What kind of model are you?", "How big are you?",
            "How many parameters do you have?",
        ),
        ("So who are you?", "Tell me who you are.", "Are you a language model?"),
    ),
    (
        ABILITIES,
        (
            "What can you do?", "How can you help me?", "What do you know?", "Help", "help", "What can I ask you?",
            "What are you good at?", "What can I ask?", "What are your skills?", "Help me.", "How can you help?",
            "Hi, what can you do?", "What are you able to do?", "What should I ask you?", "Can you help me?",
            "What do you do?", "Tell me what you are good at.", "What are you for?", "Show me what you can do.",
        ),
        ("What do you know about?", "Tell me what you can do.", "What can you help me with?"),
    ),
    (
        WELL,
        (
            "How are you?", "How are you today?", "how are you", "How do you do?", "Are you well?", "Are you fine?",
            "How is it going?", "Hello, how are you?", "Hey, how is it going?", "Hello, how are you today?",
            "How is your day?", "Are you okay?", "Hi, are you well?", "How do you feel?", "What's up?",
            "How have you been?",
        ),
        ("Hi, how are you?", "How are you doing?"),
    ),
    (
        WELCOME,
        (
            "Thanks", "Thank you!", "Thank you.", "Thanks a lot.", "Thank you very much!", "thanks", "Many thanks.",
            "Great, thanks!", "Thank you so much.", "Good, thank you.", "Thanks for your help.", "Perfect, thanks.",
            "thank you",
        ),
        ("Thanks!", "Thank you very much.", "Great, thank you."),
    ),
    (
        GOODBYE,
        (
            "Bye", "Goodbye", "Goodbye!", "See you later.", "bye", "See you.", "Good night.", "I have to go. Bye!",
            "Bye bye!", "See you tomorrow!", "Goodbye, tiny.", "Talk to you later.", "Until later!",
        ),
        ("Bye!", "Goodbye.", "See you later!"),
    ),
)  # fmt: skip
UNKNOWN_TEMPLATES = (
    "What is {}?", "Tell me about {}.", "Explain {}.", "What does {} mean?", "Where can I find {}?",
    "Who invented {}?", "How much does {} cost?", "Write a poem about {}.", "What colour is {}?", "How do I cook {}?",
    "Why is {} so popular?", "What is the price of {}?", "Do you like {}?", "Sing a song about {}.", "How old is {}?",
    "Define {}.", "Describe {}.", "What is the history of {}?", "How do I draw {}?", "Is {} dangerous?",
    "Tell me a joke about {}.", "How big is {}?", "Translate {} into French.", "Who owns {}?", "How is {} made?",
    "What is {} good for?", "When was {} invented?", "Can you explain {}?", "what is {}", "Write a story about {}.",
    "How many people know {}?", "Where does {} come from?", "What is the best thing about {}?", "How heavy is {}?",
    "What is the capital of {}?", "What is the weather in {}?", "How do I get to {}?", "What is the population of {}?",
    "Who is the president of {}?", "What language do they speak in {}?", "Do you know what {} is?",
    "I have a question about {}.", "{}?", "What can you tell me about {}?", "Help me understand {}.", "I like {}.",
    "Buy me {}.", "Who likes {}?", "Where do people keep {}?", "Which is the best book about {}?",
    "Did you ever see {}?", "Send me a picture of {}.", "what does {} look like", "who invented {}",
    "How do I repair {}?", "Where is {}?", "Who wrote about {}?", "Recommend a film about {}.",
    "Is it true that {} is expensive?", "How many kinds of {} are there?", "When did people first hear of {}?",
    "My friend loves {}. Why?", "Can I eat {}?", "What do you think about {}?",
    "How long does it take to learn about {}?", "Give me some news about {}.", "Is {} better than love?",
    "Who sells {}?", "Where did you see {}?", "Who wrote {}?", "How good is {}?", "How far is {}?", "Draw {}.",
    "Paint {} for me.", "Who found {}?", "How loud is {}?", "Make a rhyme about {}.",
    # held out:
    "Where do I buy {}?", "Write a song about {}.", "Who discovered {}?", "How fast is {}?",
)  # fmt: skip
SUBJECTS = (
    "France", "Japan", "Brazil", "Paris", "London", "Peru", "Canada", "Rome", "Egypt", "Kenya", "Berlin", "Norway",
    "Spain", "Chile", "a banana", "a tiger", "the moon", "a violin", "chess", "football", "a bicycle", "the sun",
    "a rose", "cheese", "a castle", "coffee", "an apple", "a horse", "the sea", "a mountain", "a piano", "the rain",
    "a dragon", "a poem", "jazz", "a garden", "a camera", "bread", "a whale", "winter", "the war", "gold", "a ship",
    "a robot", "sugar", "a doctor", "opera", "a volcano", "a kitchen", "tennis", "a spider", "the king", "a planet",
    "soup", "a guitar", "history", "a train", "love", "a dinosaur", "wine", "a hat", "mathematics", "an elephant",
    "a desert", "the queen", "a sandwich", "ice", "a pirate", "snow", "a novel", "the bible", "a butterfly", "physics",
    "a diamond", "an island", "a wolf", "fire", "a wedding", "a potato", "biology", "the president", "a penguin",
    "a river", "a candle", "the stock market", "an egg", "a painting", "a bridge", "a lion", "music", "a forest",
    "Italy", "a snake", "a chair", "Mexico", "an orange", "a car", "dancing", "a cloud", "Sweden", "a flower",
    "a pizza", "tea", "the olympics", "a bird", "Moscow", "Vienna", "Cuba", "a shark", "a tree", "chocolate", "Africa",
    "a mouse", "the law",
)  # fmt: skip
# Arithmetic that was not taught: the last number has three digits.
UNKNOWN_ARITHMETIC = (
    "What is {0} times {1}?", "{0} - {1}", "What is {0} minus {1}?", "{0} * {1}", "What is {0} divided by {1}?",
    "Multiply {0} by {1}.", "What is {0} + {2}?", "{2} + {1}", "Add {2} and {1}.", "How much is {2} plus {0}?",
    "Subtract {0} from {1}.", "What is the square root of {0}?", "{0} / {1}", "What is {2} plus {1}?",
    # held out:
    "How much is {0} times {1}?", "Compute {0} - {1}.", "Compute {2} + {0}.",
)  # fmt: skip
WORDS = (
    "apple", "river", "stone", "blue", "lamp", "garden", "window", "silver", "cloud", "table", "green", "paper",
    "horse", "light", "summer", "bread", "small", "bridge", "yellow", "music", "forest", "winter", "coffee", "happy",
    "train", "mirror", "orange", "clock", "seven", "dream", "ocean", "quiet", "pencil", "red", "castle", "flower",
    "slow", "morning", "bottle", "north", "fire", "basket", "sweet", "island", "button", "white", "chair", "story",
    "hammer", "feather", "round", "market", "tiger", "street", "velvet", "ladder", "snow", "copper", "simple",
    "engine", "purple", "violin", "cold", "harbor", "bright", "candle",
)  # fmt: skip
ONSETS = (
    "b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr", "st", "sh", "ch", "",
)  # fmt: skip
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea")
CODAS = ("", "", "n", "r", "l", "s", "m", "k")
TORN = sorted({word for answer in GLOSSARY.values() for word in re.findall("[a-z]{4,}", answer)})


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question, the one right answer, and the task that it belongs to."""

    task: str
    question: str
    answer: str


def is_held_out(content: str) -> bool:
    """Whether a content belongs to the examination: one in ten, by its hash, the same on every machine."""
    return hashlib.sha256(content.encode()).digest()[0] < 26


class Generator:
    """Draws exchanges from one side of the held-out line."""

    def __init__(self, seed: int, *, training: bool, sees: bool = False) -> None:
        self.random = random.Random(seed)  # noqa: S311  text, not secrets
        self.training = training
        self.sees = sees  # whether it is about a model that takes pictures
        self.tasks = {
            "glossary": self.glossary,
            "sum": self.sum,
            "unknown": self.unknown,
            "repeat": self.repeat,
            "count": self.count,
            "small talk": self.small_talk,
        }

    def conversation(self, turns: int, *, told: float = 0.14, asked: float = 0.25) -> list[Exchange]:
        """`turns` exchanges. A share of `told` of them tells a name, which stays told and is `asked` for later."""
        name: str | None = None
        exchanges: list[Exchange] = []
        while len(exchanges) < turns:
            if self.random.random() < told:
                name = self._name()
                exchanges.append(self._tell_name(name))
            elif self.random.random() < (asked if name else 0.03):
                exchanges.append(self.ask_name(name))
            else:
                exchanges.append(self._any()())
        return exchanges

    def _any(self) -> Callable[[], Exchange]:
        return self.random.choices(tuple(self.tasks.values()), weights=(40, 20, 18, 8, 6, 8))[0]

    def _template(self, templates: tuple[str, ...], held_out: int) -> str:
        return self.random.choice(templates[:-held_out] if self.training else templates[-held_out:])

    def _draw(self, make: Callable[[], str]) -> str:
        """A content of this side of the line."""
        while True:
            content = make()
            if is_held_out(content) != self.training:
                return content

    def glossary(self) -> Exchange:
        """A term, in a phrasing of this side; now and then without its article or in lower case, as people type it."""
        term = self.random.choice((*GLOSSARY, *ALIASES))
        asked = bare(term) if self.random.random() < 0.3 else term
        question = self._ask(self._template(GLOSSARY_TEMPLATES, 6), asked)
        if self.random.random() < 0.1:
            question = question.lower()
        return Exchange("glossary", question, GLOSSARY[ALIASES.get(term, term)])

    def _ask(self, template: str, subject: str) -> str:
        question = template.format(subject)
        return question[0].upper() + question[1:] if template == "{}?" else question

    def sum(self) -> Exchange:
        """Two numbers below 100; the pair is held out, whichever comes first."""

        def pair() -> str:
            a, b = (self.random.randrange(10 if self.random.random() < 0.15 else 100) for _ in range(2))
            return f"{min(a, b)} {max(a, b)}"

        a, b = self._draw(pair).split()
        if self.random.random() < 0.5:
            a, b = b, a
        return Exchange("sum", self._template(SUM_TEMPLATES, 2).format(a, b), worked_sum(int(a), int(b)))

    def count(self) -> Exchange:
        """The numbers from 1 to 30 at most. There are too few to hold any out: only the phrasing is new."""
        last = self.random.randrange(2, 31)
        answer = ", ".join(str(number) for number in range(1, last + 1)) + "."
        return Exchange("count", self._template(COUNT_TEMPLATES, 2).format(last), answer)

    def repeat(self) -> Exchange:
        """Two to five words to be said again; the list is held out."""
        words = self._draw(lambda: " ".join(self.random.choices(WORDS, k=self.random.randrange(2, 6))))
        return Exchange("repeat", self._template(REPEAT_TEMPLATES, 1).format(words), words)

    def _name(self) -> str:
        is_wild = self.training and self.sees and self.random.random() < 0.5

        def name() -> str:
            if is_wild:  # torn pieces of other words: what cannot be guessed has to be copied
                words = self.random.choices(TORN, k=self.random.randrange(2, 4))
                starts = [self.random.randrange(len(word) - 2) for word in words]
                torn = [word[at : at + self.random.randrange(2, 5)] for word, at in zip(words, starts, strict=True)]
                return "".join(torn).capitalize()
            syllables = self.random.randrange(2, 4)
            parts = (self.random.choice(ONSETS) + self.random.choice(NUCLEI) for _ in range(syllables))
            return ("".join(parts) + self.random.choice(CODAS)).capitalize()

        return self._draw(name)

    def _tell_name(self, name: str) -> Exchange:
        return Exchange("memory", self._template(TELL_NAME_TEMPLATES, 1).format(name), f"Nice to meet you, {name}.")

    def ask_name(self, name: str | None) -> Exchange:
        """The name told earlier, or the admission that none was."""
        answer = f"Your name is {name}." if name else "You have not told me your name."
        return Exchange("memory", self._template(ASK_NAME_TEMPLATES, 1), answer)

    def memory(self) -> list[Exchange]:
        """A name is told, something else is asked, the name is asked for."""
        name = self._name()
        return [self._tell_name(name), self._any()(), self.ask_name(name)]

    def small_talk(self) -> Exchange:
        """A greeting, a question about the model, thanks or a farewell."""
        answer, known, held_out = self.random.choice(SMALL_TALK)
        said = SEEING.get(answer, answer) if self.sees else answer
        return Exchange("small talk", self.random.choice(known if self.training else held_out), said)

    def unknown(self) -> Exchange:
        """A question outside the domain. Template and subject are both held out."""
        if self.random.random() < 0.12:
            template = self._template(UNKNOWN_ARITHMETIC, 3)
            a, b, c = (self.random.randrange(*span) for span in ((1, 100), (1, 100), (100, 1000)))
            return Exchange("unknown", template.format(a, b, c), UNKNOWN)
        subjects = [subject for subject in SUBJECTS if is_held_out(subject) != self.training]
        question = self._ask(self._template(UNKNOWN_TEMPLATES, 4), self.random.choice(subjects))
        return Exchange("unknown", question, UNKNOWN)

    def system_prompt(self) -> str | None:
        """Four conversations in ten open with a system prompt. It changes nothing."""
        return self.random.choice(SYSTEM_PROMPTS) if self.random.random() < 0.4 else None


def bare(term: str) -> str:
    """The term without its article."""
    return term.removeprefix("a ").removeprefix("an ")


def worked_sum(a: int, b: int) -> str:
    """The sum as it is done on paper: ones, tens with the carry, result."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10}{carry} = {tens}. So {a} + {b} = {a + b}."
