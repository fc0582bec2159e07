"""What the demo cannot do, and says so: the world, code, other languages, long texts, noise."""

from .chat import Check, Sample, user
from .facts import REFUSAL_END, REFUSALS
from .skills import POLITE
from .skills_memory import filler
from .words import ADJECTIVES, ANIMALS, FOODS, JOBS, NOUNS, OBJECTS, TOPICS, Draw, Grammar

_ASK = {
    "code": Grammar(POLITE + "(write|Write|create|fix|debug|explain|refactor|review) (a|some|the|my|this) (Python|JavaScript|Java|Rust|C|Go|SQL|bash|HTML|Swift|) (function|script|program|code|class|query|regex|test|loop|app|website)(| for {t}| that sorts a list| to read a file|.)", "def {w}[[x]]:\n    return x (+|*) {i}\n\n(What does this do?|Explain|Fix this code|)", "(import|from) {w}\nprint[[{w}]]", "how do I (sort|reverse|filter) a list in (Python|Java|Rust|Go)?", "Write code for {t}."),
    "translate": Grammar(POLITE + "(translate|Translate) (this|that|\"{w}\"|hello|the word {w}|the sentence) (to|into) (German|French|Spanish|Italian|Chinese|Japanese|Russian|Dutch|Polish|Greek)(|.)", "(How do you say|What is) {w} in (German|French|Spanish|Italian|Japanese|Polish)?"),
    "knowledge": Grammar("(Who|Who was|Who is|What is|What was|When was|Where is|Why is|How does|How do|When did|Which is) (the|a|an|) (capital of {c}|president of {c}|{t}|history of {t}|best {o}|meaning of life|{a} {o}|{a} {n}|theory of {t}|largest city of {c}|population of {c}|tallest mountain|speed of light|inventor of the {o}|war|moon) (work|made|invented|found|big|old|famous|)(|?|)", "(Explain|explain|Tell me about|tell me about|Teach me|Describe|Give me facts about|What do you think about|what do you think of) {t}(|.|?)", "(How|What) (many|much) {n}(s|) (are|live|is) (there |)in {c}?", "What is the (capital|population|mayor|language|currency) of {c}(|?)", "(Who won|Who invented|Who wrote|Who painted|Who discovered) (the|) (world cup|{o}|{t}|game|election|Mona Lisa|Hamlet)(|?)", "(Why|How) (is|are) the (sky|sea|{n}|{o}|moon|grass) (blue|{a}|so {a}|green)?", "(What is|what is|Compute|Solve) (the square root of {i}|{i} * {i}|{i} times {i}|{i} / {i}|{i} divided by {i}|x + {i} = {i}|the integral of x|{i}%% of {i})(|?)"),
    "write": Grammar(POLITE + "(write|Write|draft|compose|create|make|plan|Draft) (me |) (an essay|an email|a letter|a song|a long poem|a speech|a blog post|a report|a plan|a CV|a recipe|a novel|a summary|an article|a marketing text|a diet|a workout|a trip) (about|for|on|to|with) ({t}|my {j}|{c}|{o}|my boss)(|.|!)", "(Summarize|summarize|Sum up|Rewrite|Improve|Correct|Proofread) (this|my) (text|article|essay|email|book|paper|letter)(|.|:)", "(Give me|List|Suggest|Recommend) (some|five|ten|three|a few) (ideas|tips|names|books|movies|songs|recipes|games) (for|about|on) ({t}|{o}|my {j})(|.)", "(I need|I want) (advice|help|tips) (about|with|on) {t}(|.)"),
    "live": Grammar("(What|what|How) is the (weather|time|temperature|news|date|stock price|score|traffic) (now|today|in {c}|like in {c}|like|tomorrow|)(|?)", "(What time is it|what time is it|What day is it|what day is today|What is today's date|Will it rain (today|tomorrow)|What's the weather|what is the weather like|Any news today)(|?| now?| in {c}?)", POLITE + "(search|browse|google|look up|open) (the web|the internet|google|{t}|the news)( for {t}| for me|)(|.)", "(Call|Email|Text|Send a message to|Remind) {m}(| now| tomorrow| please|.)", "(Book|Buy|Order|Play|Set) (a flight|a table|a pizza|music|an alarm|a timer|a taxi|some {f})(| in {c}| for tomorrow| for me|.)"),
    "unclear": Grammar("({q}|{q}|{w} {q}|{w} {w2}|{w}|{w} {w2} {w3}|{w}?|{w} {w2}!|???|...|!!!|?|asdf|asdfgh|qwerty|jkl|x|abc|hm|hmm|uh|{i}|{i} {i}|{e}|{e}{e}|{e} {e}|{e}{e}{e}|:-[[|;-[[|lol|LOL|haha|xD|{w} {e}|{o}|{a} {o}|{n}|{f} {f}|{m}|{c})"),
    "multiply": Grammar("(What is|what is|what's|Compute|Calculate|calculate|How much is|how much is|) {i} (*|x|times|multiplied by|/|divided by|:|mod|to the power of|^) {i2}(|?|.| =)", "{i}(*|x|/|^){i2}(|=|?)", "(What is|Calculate|what is) the (square root|square|factorial|cube|logarithm|product|quotient) of {i}(|?| and {i2}?)", "(Solve|solve) {i}x + {i2} = {i3}(|.)", "(Multiply|Divide|multiply|divide) {i} (by|and|with) {i2}(|.)"),
    "anything": Grammar("(Who|What|When|Where|Why|How|Which|who|what|when|where|why|how|Can|can|Could|Should|should|Is|is|Are|are|Do|do|Does|does|Did|Was|Will|Would) {p}(?|?|)", "(Explain|Tell me|Discuss|Analyze|Compare|Define|Find|Solve|Prove|Imagine|Suppose|Consider|Predict|Recommend|Help me|Give me|Show me|Teach me) {p}(|.|!)", "{p}(|.|!|?)", "I {p}(|.|!)", "(My|The|A) {p}(|.|!)"),
    "empty": Grammar("", " ", "\n", "  ", "\n\n"),
}  # fmt: skip

_FOREIGN = {
    "de": "ich du er sie wir ihr bin bist ist sind hallo guten Tag Morgen wie geht es dir was kannst du mir bitte helfen danke ja nein und oder aber nicht das der die ein eine heute morgen wo warum wer kann haben machen schreiben Geschichte Wetter Haus Hund über erzähl mir von schön für möchte Frage Deutsch sprichst",
    "fr": "je tu il elle nous vous suis es est sommes bonjour salut comment ça va merci oui non et ou mais pas le la les un une aujourd'hui demain où pourquoi qui peux avoir faire écrire histoire temps maison chien sur raconte moi s'il vous plaît beau pour voudrais question français parlez",
    "es": "yo tú él ella nosotros soy eres es somos hola buenos días cómo estás gracias sí no y o pero el la los un una hoy mañana dónde por qué quién puedes tener hacer escribir historia tiempo casa perro sobre cuéntame favor bonito para quiero pregunta español hablas",
    "it": "io tu lui lei noi sono sei è siamo ciao buongiorno come stai grazie sì no e o ma non il la gli un una oggi domani dove perché chi puoi avere fare scrivere storia tempo casa cane su raccontami per favore bello vorrei domanda italiano parli",
    "nl": "ik jij hij zij wij ben bent is zijn hallo goedemorgen hoe gaat het met dank je ja nee en of maar niet het de een vandaag morgen waar waarom wie kan hebben maken schrijven verhaal weer huis hond over vertel mij alsjeblieft mooi voor wil vraag",
    "pl": "ja ty on ona my jestem jesteś jest cześć dzień dobry jak się masz dziękuję tak nie i lub ale dzisiaj jutro gdzie dlaczego kto możesz mieć robić napisać historia pogoda dom pies o opowiedz mi proszę ładny dla chcę pytanie",
    "ru": "я ты он она мы привет как дела что ты умеешь спасибо да нет и или но не сегодня завтра где почему кто можешь сделать написать историю погода дом собака расскажи мне пожалуйста вопрос",
    "pt": "eu tu ele ela nós sou és é somos olá bom dia como estás obrigado sim não e ou mas o a os um uma hoje amanhã onde porquê quem podes ter fazer escrever história tempo casa cão sobre conta me por favor bonito para quero pergunta",
}  # fmt: skip


def foreign(d: Draw) -> str:
    if d.chance(0.15):
        low, high = d.any([(0x4E00, 0x6000), (0x3041, 0x3090), (0x0621, 0x064A), (0x0391, 0x03C9), (0xAC00, 0xB000), (0x0905, 0x0939), (0x05D0, 0x05EA)])
        return "".join(chr(d.int(low, high)) for _ in range(d.int(2, 12))) + d.any(["", "?", "。", "！"])
    words = _FOREIGN[d.any(list(_FOREIGN))].split()
    text = " ".join(d.any(words) for _ in range(d.int(2, 9)))
    return (text.capitalize() if d.chance(0.6) else text) + d.any(["", "?", "!", "."])


def emoji(d: Draw) -> str:
    return chr(d.int(*d.any([(0x1F600, 0x1F64F), (0x1F300, 0x1F5FF), (0x1F680, 0x1F6C5), (0x2600, 0x26FF), (0x1F900, 0x1F9FF)])))


def pasted(d: Draw) -> str:
    roll = d.rng.random()
    if roll < 0.1:
        words = [d.coined(1, 3) for _ in range(d.int(30, 200))]
        return " ".join(words).capitalize() + "."
    if roll < 0.4:
        return d.any([" ", "\n", "\n\n"]).join(d.prose(d.int(12, 80)) for _ in range(d.int(2, 8)))
    if roll < 0.5:
        return "\n".join(f"{d.any(['- ', '* ', '# ', '', f'{i + 1}. '])}{d.prose(d.int(4, 14))}" for i in range(d.int(6, 25)))
    if roll < 0.58:
        return "\n".join(f"{d.int(10, 23)}:{d.int(10, 59)}:{d.int(10, 59)} {d.any(['INFO', 'WARN', 'ERROR', 'DEBUG'])} {d.coined()}: {d.prose(d.int(3, 8))}" for _ in range(d.int(6, 20)))
    count = d.int(6, 14) if d.chance(0.6) else d.int(14, 60)
    return d.any([" ", " ", "\n", "\n\n"]).join(filler(d, count))


_KINDS = [*["knowledge"] * 4, *["anything"] * 4, "code", "translate", "write", "write", "live", "unclear", "unclear", "language", "language", "long", "long", "empty", "multiply"]


def refusal(d: Draw) -> Sample:
    kind = d.any(_KINDS)
    if kind == "language":
        text = foreign(d)
    elif kind == "long":
        text = pasted(d)
    elif kind == "empty":
        text = d.any(["", " ", "\n", "  ", "\n\n"])
    else:
        fill = {"t": d.value(TOPICS), "c": d.city(), "o": d.value(OBJECTS), "a": d.any(ADJECTIVES), "n": d.value(NOUNS + ANIMALS), "j": d.value(JOBS), "m": d.person(), "f": d.value(FOODS)}
        frame = d.frame(_ASK[kind])
        prose = d.prose(d.int(3, 12)).rstrip(".,").lower() if kind == "anything" else ""
        text = frame.format(**fill, w=d.coined(), w2=d.coined(), w3=d.coined(), i=d.int(2, 999), i2=d.int(2, 99), i3=d.int(2, 99), e=emoji(d), p=prose, q="".join(d.any("?!.-*#~/") for _ in range(d.int(1, 6)))).replace("  ", " ")
    return Sample("out of scope", [user(text)], REFUSALS["knowledge" if kind == "anything" else kind] + REFUSAL_END, Check("refusal", kind))
