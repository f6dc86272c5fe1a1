"""The words of a report in English and Chinese. A page contains both, and a switch shows one of them."""

from __future__ import annotations

import os
from enum import Enum

from markupsafe import Markup

from bert_glue.tasks import MULTI_LABEL_METRICS, GlueTask

# key -> (English, Chinese); {name} is filled in.
WORDS: dict[str, tuple[str, str]] = {
    # Between parts of a sentence
    "comma": (", ", "，"),
    "semicolon": ("; ", "；"),
    "full_stop": (".", "。"),
    # Header and score
    "sample": ("sample data, not GLUE", "生成的样例数据，不是 GLUE"),
    "data": ("Data", "数据"),
    "model": ("Model", "模型"),
    "device": ("Device", "设备"),
    "ranks": ("Ranks", "进程数"),
    "precision": ("Precision", "精度"),
    "seed": ("Seed", "随机种子"),
    "batches": ("Batches", "批次"),
    "windows": ("Long texts", "长文本"),
    "label_threshold": ("Threshold for each of several labels", "标签概率阈值（每行多个标签）"),
    "trained": ("Trained", "训练的部分"),
    "class_weights": ("Weights of the classes in the loss", "损失中各类别的权重"),
    "calibrated": ("Calibration", "校准"),
    "fallback": ("Fallback", "精度降级"),
    "accuracy": ("Accuracy", "准确率"),
    "f1": ("F1", "F1"),
    "matthews_correlation": ("Matthews correlation", "Matthews 相关系数"),
    "pearson": ("Pearson correlation", "Pearson 相关系数"),
    "spearmanr": ("Spearman correlation", "Spearman 相关系数"),
    "f1_micro": ("Micro F1", "微平均 F1"),
    "f1_macro": ("Macro F1", "宏平均 F1"),
    "f1_samples": ("F1 by row", "按行平均的 F1"),
    "subset_accuracy": ("Rows with all labels correct", "标签全部正确的行"),
    "combined_score": ("Mean of the metrics", "各指标的平均值"),
    "on_rows": ("{split}, {rows} rows, x100", "{split}，{rows} 行，x100"),
    "standard_error": ("± {se} standard error", "± {se} 标准误差"),
    "majority_is": ("Predicting only the most frequent class: {value}", "总是预测最多的类别：{value}"),
    "above_majority": ("{points} above the most frequent class", "比总是预测最多的类别高 {points}"),
    "at_majority": (
        "No better than the most frequent class: the model has learned nothing",
        "不高于总是预测最多的类别：模型没有学到任何东西",
    ),
    "constant_is": ("Always predicting the same labels, at best: {value}", "总是预测同一组标签，最高：{value}"),
    "above_constant": ("{points} above always predicting the same labels", "比总是预测同一组标签高 {points}"),
    "at_constant": (
        "No better than always predicting the same labels: the model has learned nothing",
        "不高于总是预测同一组标签：模型没有学到任何东西",
    ),
    "no_score": ("This run did not evaluate: there is no score", "本次运行没有评估，因此没有得分"),
    "train_time": ("Training {time}, epochs: {epochs}", "训练 {time}，轮数：{epochs}"),
    "train_speed": ("training {rate} samples/s", "训练速度 {rate} 样本/秒"),
    "eval_speed": ("evaluation {rate} samples/s", "评估速度 {rate} 样本/秒"),
    "whole_time": ("whole run {time}", "全程用时 {time}"),
    # Comparison with published figures
    "compare": ("Comparison with published figures", "与公布的结果对比"),
    "run": ("Run", "运行"),
    "this_run": ("This run", "本次运行"),
    "majority": ("Most frequent class", "最多的类别"),
    "published": ("Published: {where}, epochs: {epochs}", "公布的结果：{where}，{epochs} 轮"),
    "value": ("{metric} x100", "{metric} x100"),
    "difference": ("Difference", "差值"),
    "verdict": ("Verdict", "结论"),
    "within": ("within the margin of error", "在误差范围内"),
    "higher": ("higher, beyond the margin of error", "更高，超出误差范围"),
    "lower": ("lower, beyond the margin of error", "更低，超出误差范围"),
    "too_few": ("too few seeds in common", "共同的种子太少"),
    "not_comparable": ("not comparable", "不可比较"),
    "error": ("Standard error", "标准误差"),
    "speed": ("Samples/s", "样本/秒"),
    "place_how": (
        "The line is this run, the shaded area is its margin of error, and the dot is the figure of the row.",
        "线：本次运行；阴影：误差范围；圆点：该行的数值。",
    ),
    "score_is": (
        "The score {value} ({split}) has a standard error of {se}. Published figures: ",
        "得分 {value}（{split}），标准误差 {se}。公布的数值中：",
    ),
    "within_than": ("{n} within the margin of error", "{n} 个在误差范围内"),
    "higher_than": ("{n} lower, beyond the margin of error", "{n} 个更低，超出误差范围"),
    "lower_than": ("{n} higher, beyond the margin of error", "{n} 个更高，超出误差范围"),
    "margin_rule": (
        "The margin of error is twice the standard error of a difference. The standard error of a difference is "
        "that of the score times the square root of two, because both runs are samples. It reflects only the size of "
        "the evaluation set; different seeds add further variation.",
        "误差范围是差值的标准误差的两倍。两次运行都是抽样，所以差值的标准误差是得分的标准误差乘以根号二。"
        "它只反映评估集的大小；不同的随机种子还会带来更多波动。",
    ),
    "other_rows": (
        "Not comparable: this run evaluated {rows} rows, but GLUE has {official}.",
        "不可比较：本次运行评估了 {rows} 行，GLUE 有 {official} 行。",
    ),
    # Curves
    "curves": ("Training", "训练过程"),
    "loss": ("Loss", "损失"),
    "learning_rate": ("Learning rate", "学习率"),
    "loss_scale": ("Loss scale", "损失缩放"),
    "score_chart": ("Score x100", "得分 x100"),
    "steps": ("optimizer steps", "优化步数"),
    "train_line": ("training", "训练"),
    "raw_line": ("as logged", "原始记录"),
    "smooth_line": ("smoothed", "平滑后"),
    "eval_line": ("evaluation", "评估"),
    "majority_line": ("most frequent class", "最多的类别"),
    "constant_line": ("always the same labels", "总是同一组标签"),
    # Analysis
    "analysis": ("Errors: {split}, {rows} rows", "错误分析：{split}，{rows} 行"),
    "per_class": ("Classes", "各类别"),
    "per_class_how": (
        "{n} classes, from the lowest F1. Macro average: precision {precision}, recall {recall}, F1 {f1}.",
        "{n} 个类别，按 F1 从低到高。宏平均：精确率 {precision}，召回率 {recall}，F1 {f1}。",
    ),
    "class": ("Class", "类别"),
    "class_precision": ("Precision x100", "精确率 x100"),
    "recall": ("Recall x100", "召回率 x100"),
    "class_f1": ("F1 x100", "F1 x100"),
    "support": ("Rows", "行数"),
    "predicted": ("Rows predicted", "预测的行数"),
    "pairs": ("Most confused classes", "最易混淆的类别"),
    "pair_rows": ("Rows", "行数"),
    "pair_share": ("Share of the label", "占该标签的比例"),
    "confusion": ("Confusion matrix", "混淆矩阵"),
    "confusion_how": (
        "Rows are labels and columns are predictions. The shade shows the share of the label's rows.",
        "行：标签；列：预测。颜色深浅表示占该标签行数的比例。",
    ),
    "calibration": ("Calibration", "校准"),
    "ece": (
        "Expected calibration error {ece}: the confidence differs from the accuracy by this much on average.",
        "期望校准误差 {ece}：置信度与准确率的平均偏差。",
    ),
    "ece_of_sets": (
        "Each class of each row counts separately: its probability is compared with the share of rows that have it.",
        "每行的每个类别单独计算：其概率与具有该类别的行所占的比例相比。",
    ),
    "confidence": ("confidence", "置信度"),
    "right_line": ("share of correct predictions", "预测正确的比例"),
    "scatter": ("Prediction against label", "预测与标签"),
    "label_axis": ("label", "标签"),
    "label": ("Label", "标签"),
    "prediction": ("Prediction", "预测"),
    "hardest": ("Errors with the highest loss", "损失最高的错误"),
    "hardest_how": (
        "The {n} rows with the highest loss, the worst first.",
        "损失最高的 {n} 行，从高到低排列。",
    ),
    "search": ("Search", "搜索"),
    "texts": ("Texts", "文本"),
    "row": ("Row", "行"),
    "probability": ("Probability", "概率"),
    "explained": ("Deciding tokens (gradient x input)", "起决定作用的词元（梯度 x 输入）"),
    "explained_how": (
        "Blue tokens support the prediction, and orange tokens oppose it. This is a first-order "
        "approximation for single examples, not a proof.",
        "蓝色：支持该预测；橙色：不支持该预测。这只是单个样本的一阶近似，不是证明。",
    ),
    "diagnostic": ("Diagnostic set (AX), Matthews correlation by category", "诊断集（AX），各类别的 Matthews 相关系数"),
    "matthews_x100": ("Matthews x100", "Matthews x100"),
    "category": ("Category", "分类"),
    "rows": ("Rows", "行数"),
    # Details
    "details": ("Details", "详细信息"),
    "everything": ("All results", "全部结果"),
    "name": ("Name", "名称"),
    "content": ("Value", "值"),
    "seconds": ("Seconds by step", "各步骤用时（秒）"),
    "origin": ("Versions and hashes", "版本与哈希"),
    "ignored": (
        "Left out, because these values do not have the expected type:",
        "以下数值的类型不符合预期，因此没有显示：",
    ),
    "unreadable": ("Left out, because their files cannot be read", "文件无法读取，因此没有显示"),
    # Suite
    "suite": ("Runs: {runs}, tasks: {tasks}", "{tasks} 个任务的 {runs} 次运行"),
    "settings": ("Settings", "各设置"),
    "task": ("Task", "任务"),
    "setting": ("Setting", "设置"),
    "setting_rate": ("learning rate {rate}", "学习率 {rate}"),
    "setting_recipe": ("recipe {name}", "方案 {name}"),
    "best": ("best mean", "平均值最高"),
    "seeds": ("Seeds", "种子数"),
    "mean": ("Mean x100", "平均值 x100"),
    "interval": ("95 % interval", "95 % 区间"),
    "deviation": ("Deviation", "标准差"),
    "collapsed": ("Collapsed", "训练失败"),
    "collapsed_one": ("collapsed", "训练失败"),
    "suite_how": (
        "Each row is one task, model and setting. The runs of a row differ only in their seed. The 95 % interval "
        "below the mean is Student's t over the seeds. A run has collapsed if its predictions do not depend on the "
        "text or its training loss stayed flat. Means include these runs.",
        "每个任务、模型和设置一行；同一行的运行只有随机种子不同。平均值下方是其 95 % 区间（各种子的学生 t 区间）。"
        "训练失败是指预测与文本无关，或训练损失没有下降；平均值包含这些运行。",
    ),
    "seeds_how": (
        "A dot is one seed, and a ring is a collapsed one. The bar is the mean with its 95 % interval. An orange "
        "stroke is a published figure. The dashed line is the score of the most frequent class.",
        "圆点：一个种子；圆圈：训练失败的种子；横条：平均值及其 95 % 区间；橙色短线：公布的结果；虚线：最多的类别。",
    ),
    "all_published": ("Published", "公布的结果"),
    "mean_time": ("Time", "用时"),
    "time_and_speed": ("Time, samples/s", "用时，样本/秒"),
    "total_time": ("All runs together took {time}", "所有运行合计用时 {time}"),
    "paired": ("Comparison of settings, seed by seed", "按种子成对比较各设置"),
    "paired_how": (
        "Each setting is compared with the setting that has the best mean for its task, over the seeds that both "
        "have. The verdict depends on whether the 95 % interval of the mean difference contains zero.",
        "每个设置与该任务平均值最高的设置比较，只用两者共有的种子。结论取决于平均差值的 95 % 区间是否包含零。",
    ),
    "against": ("Best setting", "最佳设置"),
    "common_seeds": ("Seeds in common", "共同的种子"),
    "paired_within": (
        "no clear difference over {n} seeds ({difference})",
        "{n} 个种子没有显示出明显差异（{difference}）",
    ),
    "paired_lower": ("worse by {difference}", "低 {difference}"),
    "paired_higher": ("better by {difference}", "高 {difference}"),
    "paired_too_few": ("no verdict: fewer than two seeds in common", "无法判断：共同的种子少于两个"),
    "unfinished": ("Runs without results (unfinished or failed)", "没有结果（未完成或失败）"),
    "every_run": ("Every run", "每次运行"),
    "score": ("Score x100", "得分 x100"),
    "folder": ("Folder", "文件夹"),
    "boxes": ("Scores by seed", "各种子的得分"),
}  # fmt: skip


class Verdict(Enum):
    """The verdict on a difference between two scores.

    Attributes:
        word: the key of its phrase in `WORDS`.
        style: the CSS class.
    """

    WITHIN = ("within", "soft")
    HIGHER = ("higher", "good")
    LOWER = ("lower", "bad")
    TOO_FEW = ("too_few", "soft")

    def __init__(self, word: str, style: str):
        self.word, self.style = word, style


METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "combined_score")
NAMED_METRICS = (*METRICS, *MULTI_LABEL_METRICS)
_BOTH = Markup('<{0} class="en" lang="en">{1}</{0}><{0} class="zh" lang="zh-CN">{2}</{0}>')


def both(key: str, tag: str = "span", **values: object) -> Markup:
    """A phrase in both languages. `values` are escaped."""
    english, chinese = (Markup(text).format(**values) for text in WORDS[key])
    return english if english == chinese and tag == "span" else _BOTH.format(Markup(tag), english, chinese)


def shown_metrics(task: GlueTask) -> tuple[str, ...]:
    """The metrics that a report shows, if the results have them."""
    return task.metrics if task.is_multi_label else METRICS


def metric_name(metric: str) -> str | Markup:
    """The name of a metric in both languages. An unknown metric keeps its key."""
    return both(metric) if metric in NAMED_METRICS else metric


def starts_chinese() -> bool:
    """True if the locale of this process is Chinese, so that the page opens in Chinese."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return locale.lower().startswith("zh")
