"""Generate the chat half of the training corpus with the model itself, through vLLM.

Serving uses the chat template, so an SAE that never saw a chat would be out of its depth there. Output: one JSON
object per line, `{"source": "chat", "text": <a rendered conversation, template tokens included>}`. Lines are appended
batch by batch, so an interrupted run continues where it stopped.
"""

import json
import random
from pathlib import Path

import typer
from vllm import LLM, SamplingParams

TOPICS = """
a lost dog|the ocean at night|my grandmother's kitchen|a broken bicycle|the French Revolution|photosynthesis|black holes|learning the piano|a job interview|the first snow
a haunted house|baking bread|the stock market|recycling|a summer in Rome|volcanoes|my best friend|the history of tea|Python dictionaries|sorting a list
a surprise party|losing a parent|winning a race|climate change|the Roman Empire|a talking cat|chess openings|the moon landing|a rainy Monday|public speaking
vaccines|a wedding toast|the alphabet|prime numbers|gravity|a pirate captain|the desert|insomnia|a kind teacher|spicy noodles
forgiveness|a broken heart|Shakespeare|jazz music|the solar system|a shy robot|good posture|the immune system|saving money|a bitter rival
the Great Wall of China|bees and honey|a long train journey|football|the human heart|dreams|a dragon and a knight|email etiquette|regular expressions|unit tests
the meaning of home|an angry customer|a proud father|camping in the rain|the electric car|the Bible|Buddhism|a library at midnight|growing tomatoes|running a marathon
depression|anxiety before an exam|joy|jealousy|courage|a funny misunderstanding|an old photograph|the speed of light|DNA|the water cycle
coffee|chocolate cake|vegetarian cooking|the Mediterranean|a detective|a spaceship in trouble|world peace|democracy|the printing press|a small island
"""

TASKS = """
Write a short story about {}.|Explain {} to a child.|Write a poem about {}.|Tell me three facts about {}.|What do you think about {}?|Give me advice about {}.
Write a letter to a friend about {}.|Why does {} matter?|Make a list of ideas about {}.|I feel sad when I think of {}. Can you help?|I am so happy about {}! Celebrate with me.|Write a dialogue about {}.
Summarise {} in two sentences.|Describe {} in vivid detail.|What is the history of {}?|Write a joke about {}.|I hate {}. Convince me otherwise.|How would a scientist describe {}?
Write an angry review of {}.|Write a product description for {}.|Write a Python function that has something to do with {}.|What questions should I ask about {}?|Translate a sentence about {} into Spanish.|Write a formal email about {}.
"""

SYSTEMS = [
    None,
    None,
    None,
    "You are a concise assistant.",
    "You are a warm and caring friend.",
    "You are a grumpy old professor.",
    "You answer like a poet.",
]


def split(block: str) -> list[str]:
    return [item.strip() for line in block.strip().splitlines() for item in line.split("|")]


def conversations(seed: int) -> list[list[dict[str, str]]]:
    """Every task on every topic, shuffled, each under a random system prompt."""
    rng = random.Random(seed)
    pairs = [(task, topic) for task in split(TASKS) for topic in split(TOPICS)]
    rng.shuffle(pairs)
    chats = []
    for task, topic in pairs:
        system = rng.choice(SYSTEMS)
        messages = [{"role": "system", "content": system}] if system else []
        chats.append([*messages, {"role": "user", "content": task.format(topic)}])
    return chats


def main(model: str, out: Path = Path("chats.jsonl"), limit: int = 2000, batch: int = 100, seed: int = 0) -> None:
    """Append up to LIMIT generated chats of MODEL (a folder in Hugging Face format) to OUT."""
    done = len(out.read_text().splitlines()) if out.exists() else 0
    todo = conversations(seed)[done:limit]
    llm = LLM(model, dtype="float32", max_model_len=1024, enforce_eager=True, seed=seed)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=200)
    with out.open("a") as sink:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            for messages, answer in zip(part, llm.chat(part, params, use_tqdm=False), strict=True):
                reply = {"role": "assistant", "content": answer.outputs[0].text}
                text = tokenizer.apply_chat_template([*messages, reply], tokenize=False)
                sink.write(json.dumps({"source": "chat", "text": text}) + "\n")
            sink.flush()
            typer.echo(f"{done + start + len(part):,} of {limit:,} chats")


if __name__ == "__main__":
    typer.run(main)
