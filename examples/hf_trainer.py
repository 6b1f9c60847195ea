"""A model of transformers on our kernels, trained by transformers' own Trainer. Needs the extra `hf`, and accelerate.

python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tileformer.decoder import huggingface


def main(steps: int = 30) -> tuple[float, float]:
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=20)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids))
    report = huggingface.use(model)  # attention, norms, dropout and the loss; what was left, and why
    print(str(report).splitlines()[0])

    counting = [torch.arange(start, start + 12) % 19 + 1 for start in range(64)]  # learn to count
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in counting]
    with tempfile.TemporaryDirectory() as folder:
        options = dict(max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=16, logging_steps=steps - 1)
        quiet = dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available())
        trainer = Trainer(model, TrainingArguments(folder, **options, **quiet), train_dataset=data)
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        after = trainer.evaluate(data)["eval_loss"]
    print(f"loss before {before:.2f}, after {steps} steps {after:.2f}")
    assert after < before / 2

    prompt = torch.tensor([[4, 5, 6]], device=model.device)
    model.eval()
    told = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)[0].tolist()
    print("4 5 6 goes on with", *told[3:])
    huggingface.revert(model)
    return before, after


if __name__ == "__main__":
    main()
