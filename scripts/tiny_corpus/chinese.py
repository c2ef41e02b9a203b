"""Chinese documents, built as the English ones: stories, lists to recall, arithmetic, facts."""

from __future__ import annotations

import random

from tiny_corpus.grammar import Cast, fill, mixed

BOYS = ("小明", "小华", "小刚", "小军", "小龙", "小强", "大卫", "小伟")
GIRLS = ("小红", "小丽", "小芳", "小雨", "小梅", "小云", "小雪", "小英")
COLORS = ("红色", "蓝色", "绿色", "黄色", "白色", "黑色", "紫色", "金色", "银色", "灰色")
# An object with the measure word it takes.
THINGS = (
    ("个", "皮球"), ("只", "风筝"), ("本", "书"), ("个", "杯子"), ("顶", "帽子"), ("个", "盒子"), ("条", "小船"),
    ("面", "小鼓"), ("盏", "灯"), ("把", "钥匙"), ("件", "衣服"), ("个", "铃铛"), ("条", "围巾"), ("个", "书包"),
    ("支", "铅笔"), ("把", "雨伞"), ("张", "地图"), ("块", "石头"), ("辆", "小车"), ("双", "手套"),
)  # fmt: skip
PLACES = (
    "花园里", "公园里", "森林里", "厨房里", "学校里", "市场上", "图书馆里", "村子里", "农场上",
    "海边", "河边", "山坡上",
)  # fmt: skip
SPOTS = (
    "床底下", "门后面", "篮子里", "书架上", "窗户旁边", "桌子下面", "柜子里", "大树后面",
    "桥下面", "屋顶上", "草丛里", "石头中间",
)  # fmt: skip
ANIMALS = ("小猫", "小狗", "小鸟", "兔子", "小马", "鸭子", "青蛙", "狐狸", "小熊", "老鼠", "山羊", "乌龟")
SIZES = ("可爱", "聪明", "安静", "害羞", "勇敢", "温柔", "活泼", "善良")
FOODS = ("苹果", "梨", "鸡蛋", "蛋糕", "饼干", "桃子", "橘子", "贝壳", "糖果", "包子")
WEATHER = ("晴朗", "下雨", "刮风", "寒冷", "温暖", "下雪", "炎热", "凉爽")
DAYS = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
NUMBERS = (
    "零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十",
    "十一", "十二", "十三", "十四", "十五", "十六", "十七", "十八", "十九", "二十",
)  # fmt: skip

FACTS = (
    ("天空是什么颜色的？", "天空是蓝色的。"),
    ("草是什么颜色的？", "草是绿色的。"),
    ("雪是什么颜色的？", "雪是白色的。"),
    ("牛吃什么？", "牛吃草。"),
    ("小猫怎么叫？", "小猫喵喵叫。"),
    ("小狗怎么叫？", "小狗汪汪叫。"),
    ("鱼住在哪里？", "鱼住在水里。"),
    ("鸟住在哪里？", "鸟住在树上。"),
    ("熊住在哪里？", "熊住在森林里。"),
    ("一个星期有几天？", "一个星期有七天。"),
    ("一年有几个月？", "一年有十二个月。"),
    ("小狗有几条腿？", "小狗有四条腿。"),
    ("太阳什么时候升起？", "太阳早上升起。"),
    ("什么时候能看到星星？", "晚上能看到星星。"),
    ("冬天过后是什么季节？", "冬天过后是春天。"),
    ("夏天过后是什么季节？", "夏天过后是秋天。"),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("日本的首都是哪里？", "日本的首都是东京。"),
    ("英国的首都是哪里？", "英国的首都是伦敦。"),
    ("蜜蜂做什么？", "蜜蜂采花蜜。"),
    ("冰是什么变的？", "冰是水变的。"),
    ("下雨的时候用什么？", "下雨的时候用雨伞。"),
    ("大的反义词是什么？", "大的反义词是小。"),
    ("热的反义词是什么？", "热的反义词是冷。"),
    ("医生做什么？", "医生给人看病。"),
    ("老师做什么？", "老师教孩子读书。"),
    ("农民做什么？", "农民在田里种粮食。"),
)

OPENINGS = (
    "从前，有一个{boy}叫{hero}。一个{weather}的早上，{hero}在{place}玩。",
    "{day}是一个{weather}的日子，{hero}和朋友{friend}来到{place}。",
    "{hero}是一个{size2}的{boy}。有一天，{he}在{place}散步。",
    "一个{weather}的日子，{hero}一个人在{place}。",
)
INTRODUCTIONS = (
    "{hero}有一{m}{color}的{thing}，还有一只{size}的{animal}。",
    "{he}很喜欢自己的{color}{thing}。{his}好朋友是一只{size}的{animal}。",
    "{he}带着一{m}{color}的{thing}，身边跟着一只{size}的{animal}。",
)
ENDINGS = (
    "晚上，{hero}和{friend}一起回家了。他们很累，但是很开心。",
    "“谢谢你，{friend}。”{hero}说，“你是我最好的朋友。”他们笑着回家了。",
    "从那天起，{hero}和{friend}成了好朋友，他们常常在{place}见面。",
    "{hero}把{friend}、{animal}和{color}{thing}的故事告诉了妈妈。妈妈听了很高兴。",
    "那天夜里，{hero}睡得很香，{he}梦见了{size}的{animal}和{color}的{thing}。",
)
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # 丢失
        ("可是，{color}的{thing}不见了！", "忽然，{hero}找不到{color}的{thing}了。"),
        ("{hero}很难过，哭了起来。", "“我的{thing}在哪里？”{hero}问。", "{hero}到处找，都没有找到。"),
        ("“别担心，”{friend}说，“我帮你找{thing}。”", "{friend}听见了，跑过来帮忙。"),
        (
            "他们先看了看{spot2}，只看到一{m2}{color2}的{thing2}。",
            "他们在{spot2}找到了一{m2}{color2}的{thing2}，但是那不是{hero}的。",
        ),
        ("这时，{animal}跑到前面，停在{spot}。", "最后，{animal}在{spot}叫了起来。"),
        ("原来，{color}的{thing}就在{spot}！", "{friend}一看，{color}的{thing}就在{spot}。"),
    ),
    (  # 礼物
        ("{hero}看见{friend}坐在{spot}，很难过。", "{friend}一个人在{spot}哭。"),
        ("“你怎么了？”{hero}问。", "“你为什么不高兴？”{hero}问。"),
        ("“我的{color2}{thing2}丢了。”{friend}说。", "“我的{color2}{thing2}坏了。”{friend}说。"),
        ("{hero}想了想，把{color}的{thing}送给了{friend}。", "“我把{color}的{thing}送给你。”{hero}说。"),
        ("{friend}笑了，说：“谢谢你！”", "{friend}拿着{color}的{thing}，高兴地笑了。"),
        ("第二天，{friend}给{hero}带来了{count2}个{food}。", "后来，{friend}送给{hero}{count2}个{food}。"),
    ),
    (  # 帮助动物
        ("忽然，{animal}跑走了。", "忽然，{animal}掉进了水里。", "可是{animal}又饿又累。"),
        ("{hero}很害怕，大声叫{friend}来帮忙。", "“救命！”{hero}喊道。{friend}马上跑了过来。"),
        ("他们走了很久，一边走一边叫{animal}。", "他们问了很多人，都没有看见{size}的{animal}。"),
        ("最后，他们在{spot}找到了{animal}。", "{friend}看见{animal}在{spot}。"),
        ("{hero}把{color}的{thing}放在地上，{animal}慢慢走了过来。", "{animal}看见{color}的{thing}，就不害怕了。"),
        ("他们给{animal}吃了{count2}个{food}。", "{animal}没事了，{hero}抱住了它。"),
    ),
    (  # 比赛
        ("“我们来比赛跑步吧！”{friend}说。", "{friend}想看看谁跑得快。"),
        ("“如果你赢了，我的{color2}{thing2}就给你。”{friend}说。", "谁赢了，谁就得到{color2}的{thing2}。"),
        ("{hero}放下{color}的{thing}，准备好了。", "“如果你赢了，我的{color}{thing}就给你。”{hero}说。"),
        ("他们跑过小桥，跑过老房子，{animal}在后面跟着。", "他们跑得像风一样快。"),
        ("{hero}跑了第一名，得到了{color2}的{thing2}。", "{hero}赢了，所以{color2}的{thing2}是{his}了。"),
        ("“你跑得真快！”{friend}说。他们都笑了。", "{friend}没有生气，大家都很开心。"),
    ),
    (  # 秘密
        ("{hero}在{spot}发现了一{m2}{color2}的{thing2}。", "{spot}有一{m2}{color2}的{thing2}，{hero}把它捡了起来。"),
        ("“这是谁的{thing2}？”{hero}问{friend}。", "{hero}把{thing2}拿给{friend}看。"),
        ("“我不知道。”{friend}说。", "“这不是我的。”{friend}说。"),
        ("他们往里面一看，有{count}个{food}。", "旁边还有{count}个{food}。"),
        ("一位老爷爷走过来，说{color2}的{thing2}是他的。", "一位老奶奶来了，她丢了一{m2}{color2}的{thing2}。"),
        ("他们把它还了回去，还一起分享了{count}个{food}。", "老人很高兴，把{count}个{food}都送给了{hero}和{friend}。"),
    ),
)
QUESTIONS = (
    ("{hero}的{thing}是什么颜色的？", "{hero}的{thing}是{color}的。"),
    ("{hero}在哪里？", "{hero}在{place}。"),
    ("{hero}的朋友是谁？", "{hero}的朋友是{friend}。"),
    ("{hero}身边有什么动物？", "{hero}身边有一只{size}的{animal}。"),
    ("谁有一{m}{color}的{thing}？", "{hero}有一{m}{color}的{thing}。"),
    ("{hero}有什么？", "{hero}有一{m}{color}的{thing}。"),
)


def measured(number: int) -> str:
    """The number as said before a measure word."""
    return "两" if number == 2 else NUMBERS[number]


def cast(rng: random.Random, hero: str | None = None, friend: str | None = None) -> Cast:
    """Slots for one story; no two of its names, colours, objects and spots are the same."""
    names = rng.sample(BOYS + GIRLS, 2)
    hero, friend = hero or names[0], friend or names[1]
    he, boy = ("他", "男孩") if hero in BOYS else ("她", "女孩")
    colors, things, spots, sizes = (
        rng.sample(COLORS, 2),
        rng.sample(THINGS, 2),
        rng.sample(SPOTS, 2),
        rng.sample(SIZES, 2),
    )
    return {
        "hero": hero, "friend": friend, "he": he, "his": f"{he}的", "boy": boy, "color": colors[0], "color2": colors[1],
        "m": things[0][0], "thing": things[0][1], "m2": things[1][0], "thing2": things[1][1],
        "spot": spots[0], "spot2": spots[1], "size": sizes[0], "size2": sizes[1], "place": rng.choice(PLACES),
        "animal": rng.choice(ANIMALS), "food": rng.choice(FOODS), "weather": rng.choice(WEATHER),
        "day": rng.choice(DAYS), "count": measured(rng.randint(3, 12)), "count2": measured(rng.randint(2, 9)),
    }  # fmt: skip


def tell(rng: random.Random, slots: Cast) -> str:
    """One story in one paragraph."""
    return "".join(fill(rng, (OPENINGS, INTRODUCTIONS, *rng.choice(PLOTS), ENDINGS), slots))


def questions(rng: random.Random, slots: Cast, number: int) -> list[str]:
    return [f"问：{question}答：{answer}".format_map(slots) for question, answer in rng.sample(QUESTIONS, number)]


def story(rng: random.Random) -> str:
    slots = cast(rng)
    return "\n".join([tell(rng, slots), *questions(rng, slots, rng.randint(0, 3))])


def long_story(rng: random.Random) -> str:
    """Several chapters about the same two friends, then questions about each: distances of several hundred tokens."""
    hero, friend = rng.sample(BOYS + GIRLS, 2)
    lines, asked = [f"{hero}和{friend}的故事"], []
    chapters = rng.randint(2, 4)
    things = rng.sample(THINGS, 2 * chapters)
    for chapter, ((m, thing), (m2, thing2)) in enumerate(zip(things[::2], things[1::2], strict=True), start=1):
        slots = cast(rng, hero, friend) | {"m": m, "thing": thing, "m2": m2, "thing2": thing2}
        lines.append(f"第{NUMBERS[chapter]}章。{tell(rng, slots)}")
        asked.append(f"问：{hero}的{thing}是什么颜色的？答：{hero}的{thing}是{slots['color']}的。")
        asked.append(f"问：第{NUMBERS[chapter]}章里{hero}在哪里？答：{hero}在{slots['place']}。")
    return "\n".join([*lines, *rng.sample(asked, chapters)])


def recall(rng: random.Random) -> str:
    """Who has what and where it is: a list, then every entry asked for in another order."""
    number = rng.randint(3, 8)
    names, colors = rng.sample(BOYS + GIRLS, number), rng.sample(COLORS, number)
    rows = list(zip(names, colors, rng.sample(THINGS, number), rng.sample(SPOTS, number), strict=True))
    lines = [f"{name}有一{m}{color}的{thing}，放在{spot}。" for name, color, (m, thing), spot in rows]
    rng.shuffle(rows)
    for name, color, (m, thing), spot in rows:
        question, answer = rng.choice(
            (
                (f"{name}有什么？", f"{name}有一{m}{color}的{thing}。"),
                (f"{thing}在哪里？", f"{thing}在{spot}。"),
                (f"{thing}是谁的？", f"{thing}是{name}的。"),
                (f"{thing}是什么颜色的？", f"{thing}是{color}的。"),
            )
        )
        lines.append(f"问：{question}答：{answer}")
    return "\n".join(lines)


def apples(rng: random.Random) -> tuple[str, str, str]:
    """A word problem: (story, question, answer)."""
    name, other = rng.sample(BOYS + GIRLS, 2)
    food, a, b = rng.choice(FOODS), rng.randint(2, 10), rng.randint(1, 9)
    if rng.random() < 0.5 or b >= a:
        told, total = f"{name}有{measured(a)}个{food}，{other}又给了{name}{measured(b)}个。", a + b
    else:
        told, total = f"{name}有{measured(a)}个{food}，送给{other}{measured(b)}个。", a - b
    return told, f"{name}现在有几个{food}？", f"{name}现在有{measured(total)}个{food}。"


def arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        kind = rng.randrange(4)
        if kind == 0:
            lines.append(f"{a} + {b} = {a + b}。{NUMBERS[a]}加{NUMBERS[b]}等于{NUMBERS[a + b]}。")
        elif kind == 1:
            a, b = max(a, b), min(a, b)
            lines.append(f"{a} - {b} = {a - b}。{NUMBERS[a]}减{NUMBERS[b]}等于{NUMBERS[a - b]}。")
        elif kind == 2:
            start = rng.randint(0, 12)
            lines.append(f"我们来数数：{'、'.join(NUMBERS[start : start + rng.randint(5, 8)])}。")
        else:
            lines.append("".join(apples(rng)))
    return "\n".join(lines)


def facts(rng: random.Random) -> str:
    answers = [answer for _, answer in rng.sample(FACTS, rng.randint(4, 8))]
    if rng.random() < 0.5:
        start = rng.randrange(len(DAYS))
        answers.append(f"{DAYS[start]}的后面是{DAYS[(start + 1) % len(DAYS)]}。")
    if rng.random() < 0.3:
        answers.append(f"一个星期里有{'、'.join(DAYS)}。")
    rng.shuffle(answers)
    return "".join(answers)


write = mixed(((45, story), (15, long_story), (18, recall), (12, arithmetic), (10, facts)))
