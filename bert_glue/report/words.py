"""The words of a report in English and Chinese, both in one page; a switch without script shows one of them."""

from __future__ import annotations

import html
import os

# key -> (English, Chinese); {name} is filled in.
WORDS: dict[str, tuple[str, str]] = {
    "sample": ("sample data, not GLUE", "生成的示例数据，不是 GLUE"),
    "data": ("Data", "数据"),
    "device": ("Device", "设备"),
    "ranks": ("{n} rank(s)", "{n} 个进程"),
    "precision": ("Precision", "精度"),
    "seed": ("Seed", "随机种子"),
    "batches": ("Batches", "批次"),
    "trained": ("Trained", "训练的部分"),
    "fallback": ("Fallback", "降级"),
    "standard_error": ("standard error {se}", "标准误差 {se}"),
    "majority_is": ("always the most frequent class: {value}", "总是预测最多的类别：{value}"),
    "at_majority": ("no better than the most frequent class: nothing was learned", "不高于多数类别：没有学到东西"),
    "train_speed": ("training, samples/s", "训练速度，样本/秒"),
    "eval_speed": ("evaluation, samples/s", "评估速度，样本/秒"),
    "train_time": ("training {time}, epochs: {epochs}", "训练 {time}，轮数：{epochs}"),
    "whole_time": ("whole run", "全程时间"),
    "compare": ("Beside published figures", "与公布的结果对比"),
    "run": ("run", "运行"),
    "this_run": ("this run", "本次运行"),
    "majority": ("most frequent class", "多数类别"),
    "published": ("published: {where}, {epochs} epochs", "公布的结果：{where}，{epochs} 轮"),
    "value": ("{metric} x100", "{metric} x100"),
    "difference": ("difference", "差值"),
    "verdict": ("is it noise?", "是否为噪声？"),
    "noise": ("within noise", "在噪声之内"),
    "higher": ("higher, beyond noise", "更高，超出噪声"),
    "lower": ("lower, beyond noise", "更低，超出噪声"),
    "error": ("standard error", "标准误差"),
    "place_how": (
        "Line: this run; shaded: what differs from it by noise only; dot: the figure of the row.",
        "线：本次运行；阴影：与它只相差噪声的范围；圆点：该行的数值。",
    ),
    "score_is": ("{value}{split}, standard error {se}:", "{value}{split}，标准误差 {se}："),
    "noise_than": ("within noise of {n} published figure(s)", "与 {n} 个公布的数值之差在噪声之内"),
    "higher_than": ("higher than {n}, beyond noise", "高于 {n} 个，超出噪声"),
    "lower_than": ("lower than {n}, beyond noise", "低于 {n} 个，超出噪声"),
    "sample_compared": (
        "Not comparable: this is generated sample data, not GLUE.",
        "不可比较：这是生成的示例数据，不是 GLUE。",
    ),
    "not_comparable": ("not comparable", "不可比较"),
    "speed": ("samples/s", "样本/秒"),
    "noise_rule": (
        "A difference counts as noise while it is at most twice its standard error (the score's own times the square "
        "root of two: both runs are samples). It knows the size of the evaluation set only; seeds add more.",
        "差值不超过其标准误差的两倍时视为噪声（得分的标准误差乘以根号二：两次运行都是抽样）。"
        "这里只考虑评估集的大小，随机种子会带来更多波动。",
    ),
    "other_rows": (
        "Not comparable: {rows} rows were evaluated, GLUE has {official}.",
        "不可比较：评估了 {rows} 行，GLUE 有 {official} 行。",
    ),
    "curves": ("Curves", "曲线"),
    "loss": ("loss", "损失"),
    "learning_rate": ("learning rate", "学习率"),
    "loss_scale": ("loss scale", "损失缩放"),
    "metric": ("score", "得分"),
    "steps": ("optimizer steps", "优化步数"),
    "training_line": ("training", "训练"),
    "evaluation_line": ("evaluation", "评估"),
    "no_curve": (
        "No curve: this run did not train, or logged no step.",
        "没有曲线：本次运行没有训练，或没有记录任何一步。",
    ),
    "analysis": ("Analysis: {split}, {rows} rows", "分析：{split}，{rows} 行"),
    "confusion": ("Confusions", "混淆矩阵"),
    "confusion_how": ("row: label, column: prediction", "行：标签，列：预测"),
    "calibration": ("Calibration", "校准"),
    "ece": (
        "expected calibration error {ece}: on average the confidence is off by so much",
        "期望校准误差 {ece}：置信度平均偏离这么多",
    ),
    "confidence": ("confidence", "置信度"),
    "accuracy": ("share right", "正确比例"),
    "scatter": ("Prediction against label", "预测与标签"),
    "label": ("label", "标签"),
    "prediction": ("prediction", "预测"),
    "hardest": ("Hardest errors", "最难的错误"),
    "texts": ("texts", "文本"),
    "row": ("row", "行"),
    "probability": ("probability", "概率"),
    "explained": ("Which tokens decided (gradient x input)", "哪些词起了作用（梯度 x 输入）"),
    "explained_how": (
        "Blue: towards the prediction; orange: against it. The first order of one example, not a proof.",
        "蓝色：支持预测；橙色：反对预测。只是单个样本的一阶近似，不是证明。",
    ),
    "diagnostic": ("Diagnostic set (AX), Matthews by category", "诊断集（AX），各类别的 Matthews 系数"),
    "category": ("category", "类别"),
    "rows": ("rows", "行数"),
    "everything": ("All results", "全部结果"),
    "name": ("name", "名称"),
    "what": ("value", "值"),
    "seconds": ("Seconds by step", "各步骤用时（秒）"),
    "origin": ("Versions and hashes", "版本与哈希"),
    "suite": ("{runs} runs of {tasks} task(s)", "{tasks} 个任务的 {runs} 次运行"),
    "overview": ("Overview", "概览"),
    "task": ("task", "任务"),
    "runs": ("runs", "次数"),
    "mean": ("mean", "平均"),
    "deviation": ("deviation", "标准差"),
    "range": ("least - most", "最低 - 最高"),
    "collapsed": ("collapsed", "失败"),
    "collapsed_how": (
        "Collapsed: no better than the most frequent class, or without a value; shown as rings. Means include them. "
        "Box: quartiles and median; whiskers: least and most; each point is a seed; strokes above: "
        "published figures; dashed, or at the left where it is far below: the most frequent class.",
        "失败：不高于多数类别，或没有数值；以圆圈表示。平均值包含它们。"
        "箱体：四分位数和中位数；须线：最低和最高；每个点是一个种子；上方短线：公布的结果；虚线（远低时写在左侧）：多数类别。",
    ),
    "all_published": ("published", "公布的结果"),
    "mean_time": ("mean time", "平均用时"),
    "total_time": ("all runs together: {time}", "所有运行合计：{time}"),
    "unfinished": ("Without results (not finished, or failed)", "没有结果（未完成或失败）"),
    "every_run": ("Every run", "每次运行"),
    "folder": ("folder", "文件夹"),
    "boxes": ("Scores over seeds", "各种子的得分"),
}


def both(key: str, tag: str = "span", **values: object) -> str:
    """A phrase in both languages as HTML; `values` are escaped."""
    shown = {name: html.escape(str(value)) for name, value in values.items()}
    english, chinese = (text.format(**shown) for text in WORDS[key])
    if english == chinese:
        return english if tag == "span" else f"<{tag}>{english}</{tag}>"
    return f'<{tag} class="en" lang="en">{english}</{tag}><{tag} class="zh" lang="zh-CN">{chinese}</{tag}>'


def starts_chinese() -> bool:
    """True if the locale of this process is Chinese: the page then opens in Chinese."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return locale.lower().startswith("zh")
