"""The words of a report in English and Chinese. Both stand in the page; a switch shows one of them."""

from __future__ import annotations

import os
from enum import Enum

from markupsafe import Markup

from bert_glue.tasks import MULTI_LABEL_METRICS, GlueTask

# key -> (English, Chinese); {name} is filled in.
WORDS: dict[str, tuple[str, str]] = {
    # Header and score
    "sample": ("sample data, not GLUE", "生成的示例数据，不是 GLUE"),
    "data": ("Data", "数据"),
    "model": ("Model", "模型"),
    "device": ("Device", "设备"),
    "ranks": ("Ranks", "进程数"),
    "precision": ("Precision", "精度"),
    "seed": ("Seed", "随机种子"),
    "batches": ("Batches", "批次"),
    "windows": ("Long texts", "长文本"),
    "label_threshold": ("Several labels a row, given above the probability", "每行可有多个标签，概率高于此值时给出"),
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
    "subset_accuracy": ("Rows with all labels right", "标签全部正确的行"),
    "combined_score": ("Mean of the metrics", "各指标的平均"),
    "on_rows": ("{split}, {rows} rows, x100", "{split}，{rows} 行，x100"),
    "standard_error": ("± {se} standard error", "± {se} 标准误差"),
    "majority_is": ("Always the most frequent class: {value}", "总是预测最多的类别：{value}"),
    "above_majority": ("{points} above the most frequent class", "比总是预测最多的类别高 {points}"),
    "at_majority": (
        "No better than the most frequent class: the model has learned nothing",
        "不高于总是预测最多的类别：模型没有学到东西",
    ),
    "constant_is": ("Always the same labels, at best: {value}", "总是给出同一组标签，最高：{value}"),
    "above_constant": ("{points} above always the same labels", "比总是给出同一组标签高 {points}"),
    "at_constant": (
        "No better than always the same labels: the model has learned nothing",
        "不高于总是给出同一组标签：模型没有学到东西",
    ),
    "no_score": ("This run did not evaluate: there is no score", "本次运行没有评估，因此没有得分"),
    "train_time": ("Training {time}, epochs: {epochs}", "训练 {time}，轮数：{epochs}"),
    "train_speed": ("training {rate} samples/s", "训练速度 {rate} 样本/秒"),
    "eval_speed": ("evaluation {rate} samples/s", "评估速度 {rate} 样本/秒"),
    "whole_time": ("whole run {time}", "全程 {time}"),
    # Comparison with published figures
    "compare": ("Comparison with published figures", "与公布的结果对比"),
    "run": ("Run", "运行"),
    "this_run": ("This run", "本次运行"),
    "majority": ("Most frequent class", "最多的类别"),
    "published": ("Published: {where}, {epochs} epochs", "公布的结果：{where}，{epochs} 轮"),
    "value": ("{metric} x100", "{metric} x100"),
    "difference": ("Difference", "差值"),
    "verdict": ("Verdict", "结论"),
    "noise": ("within noise", "在噪声之内"),
    "higher": ("higher, beyond noise", "更高，超出噪声"),
    "lower": ("lower, beyond noise", "更低，超出噪声"),
    "too_few": ("too few seeds in common", "共同的种子太少"),
    "not_comparable": ("not comparable", "不可比较"),
    "error": ("Standard error", "标准误差"),
    "speed": ("Samples/s", "样本/秒"),
    "place_how": (
        "Line: this run; shaded: the range of noise around it; dot: the figure of the row.",
        "线：本次运行；阴影：噪声范围；圆点：该行的数值。",
    ),
    "score_is": (
        "The score {value} ({split}) has a standard error of {se}. It is ",
        "得分 {value}（{split}），标准误差 {se}，",
    ),
    "noise_than": ("within noise of {n} published figure(s)", "与 {n} 个公布的数值之差在噪声之内"),
    "higher_than": ("higher than {n}, beyond noise", "高于 {n} 个，超出噪声"),
    "lower_than": ("lower than {n}, beyond noise", "低于 {n} 个，超出噪声"),
    "noise_rule": (
        "A difference of at most twice its standard error counts as noise. The standard error of a difference is the "
        "score's times the square root of two, because both runs are samples. It covers the size of the evaluation "
        "set only; seeds add more.",
        "差值不超过其标准误差的两倍时视为噪声。两次运行都是抽样，所以差值的标准误差是得分的标准误差乘以根号二。"
        "这里只考虑评估集的大小，随机种子会带来更多波动。",
    ),
    "other_rows": (
        "Not comparable: this run evaluated {rows} rows, GLUE has {official}.",
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
        "Rows: label; columns: prediction. The shade is the share of the label's rows.",
        "行：标签；列：预测。颜色深浅表示占该标签行数的比例。",
    ),
    "calibration": ("Calibration", "校准"),
    "ece": (
        "Expected calibration error {ece}: the confidence is off by this much on average.",
        "期望校准误差 {ece}：置信度平均偏离这么多。",
    ),
    "ece_of_sets": (
        "Each class of each row counts by itself: its probability against the share of rows that have it.",
        "每行的每个类别单独计算：其概率与具有该类别的行所占的比例相比。",
    ),
    "confidence": ("confidence", "置信度"),
    "right_line": ("share that is right", "正确比例"),
    "scatter": ("Prediction against label", "预测与标签"),
    "label_axis": ("label", "标签"),
    "label": ("Label", "标签"),
    "prediction": ("Prediction", "预测"),
    "hardest": ("Hardest errors", "最难的错误"),
    "hardest_how": (
        "The {n} rows of the highest loss, the worst first.",
        "损失最高的 {n} 行，从最差开始。",
    ),
    "search": ("Search", "搜索"),
    "texts": ("Texts", "文本"),
    "row": ("Row", "行"),
    "probability": ("Probability", "概率"),
    "explained": ("Tokens that decided (gradient x input)", "起作用的词元（梯度 x 输入）"),
    "explained_how": (
        "Blue: towards the prediction; orange: against it. A first-order view of one example, not a proof.",
        "蓝色：支持预测；橙色：反对预测。只是单个样本的一阶近似，不是证明。",
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
        "Left out, because these values are not of the expected type:",
        "以下数值的类型不符合预期，因此没有显示：",
    ),
    "unreadable": ("Left out, because their files cannot be read", "文件无法读取，因此没有显示"),
    # Suite
    "suite": ("{runs} runs of {tasks} task(s)", "{tasks} 个任务的 {runs} 次运行"),
    "settings": ("Settings", "各设置"),
    "task": ("Task", "任务"),
    "setting": ("Setting", "设置"),
    "setting_rate": ("learning rate {rate}", "学习率 {rate}"),
    "setting_recipe": ("recipe {name}", "方案 {name}"),
    "best": ("best mean", "平均最高"),
    "seeds": ("Seeds", "种子数"),
    "mean": ("Mean x100", "平均 x100"),
    "interval": ("95 % interval", "95 % 区间"),
    "deviation": ("Deviation", "标准差"),
    "collapsed": ("Collapsed", "失败"),
    "collapsed_one": ("collapsed", "失败"),
    "suite_how": (
        "One row for each task, model and setting; runs in a row differ in their seed only. Below the mean: its 95 % "
        "interval, Student's t over the seeds. Collapsed: the predictions do not "
        "depend on the text, or the training loss stayed flat; means include these runs.",
        "每个任务、模型和设置一行；同一行的运行只有随机种子不同。平均值下方是其 95 % 区间（各种子的学生 t 区间）。"
        "失败：预测与文本无关，或训练损失没有下降；平均值包含这些运行。",
    ),
    "seeds_how": (
        "Dot: a seed; ring: a collapsed one; bar: the mean with its 95 % interval; orange stroke: a published figure; "
        "dashed: the most frequent class.",
        "圆点：一个种子；圆圈：失败的种子；横条：平均值及其 95 % 区间；橙色短线：公布的结果；虚线：最多的类别。",
    ),
    "all_published": ("Published", "公布的结果"),
    "mean_time": ("Time", "用时"),
    "time_and_speed": ("Time, samples/s", "用时，样本/秒"),
    "total_time": ("All runs together took {time}", "所有运行合计 {time}"),
    "paired": ("Comparison of settings, seed by seed", "按种子成对比较各设置"),
    "paired_how": (
        "Each setting against the one with the best mean of its task, over the seeds that both have. The verdict is "
        "whether the 95 % interval of the mean difference holds zero.",
        "每个设置与该任务平均最高的设置比较，只用两者共有的种子。结论取决于平均差值的 95 % 区间是否包含零。",
    ),
    "against": ("Best setting", "最佳设置"),
    "common_seeds": ("Seeds in common", "共同的种子"),
    "paired_noise": (
        "{n} seeds show no difference beyond noise ({difference})",
        "{n} 个种子没有显示出超过噪声的差异（{difference}）",
    ),
    "paired_lower": ("worse by {difference}, beyond noise", "低 {difference}，超出噪声"),
    "paired_higher": ("better by {difference}, beyond noise", "高 {difference}，超出噪声"),
    "paired_too_few": ("cannot be said: fewer than two seeds in common", "无法判断：共同的种子少于两个"),
    "unfinished": ("Without results (not finished, or failed)", "没有结果（未完成或失败）"),
    "every_run": ("Every run", "每次运行"),
    "score": ("Score x100", "得分 x100"),
    "folder": ("Folder", "文件夹"),
    "boxes": ("Scores by seed", "各种子的得分"),
}  # fmt: skip


class Verdict(Enum):
    """What a difference amounts to.

    Attributes:
        word: key of its phrase.
        style: CSS class.
    """

    NOISE = ("noise", "soft")
    HIGHER = ("higher", "good")
    LOWER = ("lower", "bad")
    TOO_FEW = ("too_few", "soft")

    def __init__(self, word: str, style: str):
        self.word, self.style = word, style


METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "combined_score")
NAMED_METRICS = (*METRICS, *MULTI_LABEL_METRICS)
_BOTH = Markup('<{0} class="en" lang="en">{1}</{0}><{0} class="zh" lang="zh-CN">{2}</{0}>')


def both(key: str, tag: str = "span", **values: object) -> Markup:
    """A phrase in both languages; `values` are escaped."""
    english, chinese = (Markup(text).format(**values) for text in WORDS[key])
    return english if english == chinese and tag == "span" else _BOTH.format(Markup(tag), english, chinese)


def shown_metrics(task: GlueTask) -> tuple[str, ...]:
    """The metrics that are shown of a run, where its results have them."""
    return task.metrics if task.is_multi_label else METRICS


def metric_name(metric: str) -> str | Markup:
    """A metric in both languages; an unknown one as it is."""
    return both(metric) if metric in NAMED_METRICS else metric


def starts_chinese() -> bool:
    """True if the locale of this process is Chinese: the page then opens in Chinese."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return locale.lower().startswith("zh")
