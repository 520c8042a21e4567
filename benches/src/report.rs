//! The table and the plot.

use std::fmt::Write;

use anyhow::Context;

use crate::{
    RunArgs,
    contenders::Contender,
    figures::{FIGURES, Figure, Results},
};

pub(crate) fn write(
    args: &RunArgs,
    contenders: &[Contender],
    field: &str,
    results: &Results,
) -> anyhow::Result<()> {
    let table = table(args, contenders, field, results);
    println!("{table}");
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder)?;
        for (name, text) in [
            ("performance-table.md", table),
            ("performance.svg", plot(contenders, results)),
            ("performance.json", serde_json::to_string_pretty(results)? + "\n"),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(())
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((upper + sorted.get(middle.checked_sub(1)?)?) / 2.0)
}

/// The median of the rounds' ratios: what the machine did in between cancels out.
fn ratio(results: &Results, figure: &Figure, to: Contender) -> Option<f64> {
    let own = results.of(figure, Contender::Hauberk);
    let other = results.of(figure, to);
    let ratios: Vec<f64> = own.iter().zip(other).map(|(own, other)| own / other).collect();
    median(&ratios)
}

fn shown(value: f64) -> String {
    match value.abs() {
        large if large >= 1000.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The median; least and most in brackets, if there is more than one value.
pub(crate) fn cell(values: &[f64]) -> String {
    match (median(values), values.len()) {
        (None, _) => "–".to_owned(),
        (Some(middle), 1) => shown(middle),
        (Some(middle), _) => {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            format!("{} ({}–{})", shown(middle), shown(least), shown(most))
        }
    }
}

fn table(args: &RunArgs, contenders: &[Contender], field: &str, results: &Results) -> String {
    let mut text = format!(
        "Medians of {} rounds of {:.1} s each; in brackets least and most. The last columns are the \
         medians of the ratios of each round, Hauberk to the other. Hauberk had {} rules, {field}; \
         certificates lived {}, records and metrics were on. 10,000 connections are as many as a \
         process may have here with two files each, at most {}.\n\n| |",
        args.rounds(),
        args.duration().as_secs_f64(),
        args.rules,
        args.certificate_lifetime,
        crate::processes::many_connections().unwrap_or_default()
    );
    let others: Vec<Contender> = contenders
        .iter()
        .copied()
        .filter(|other| matches!(other, Contender::Plain | Contender::Haproxy | Contender::Before))
        .collect();
    for contender in contenders {
        // Into a string: cannot fail.
        let _ok = write!(text, " {} |", contender.name());
    }
    for other in &others {
        let _ok = write!(text, " to {} |", other.name());
    }
    text += "\n|---|";
    text += &"---|".repeat(contenders.len() + others.len());
    text.push('\n');
    for figure in FIGURES {
        if contenders.iter().all(|contender| results.of(figure, *contender).is_empty()) {
            continue;
        }
        let better = if figure.more { "more" } else { "less" };
        let _ok = write!(text, "| {}, {} ({better} is better) |", figure.name, figure.unit);
        for contender in contenders {
            let _ok = write!(text, " {} |", cell(results.of(figure, *contender)));
        }
        for other in &others {
            let cell =
                ratio(results, figure, *other).map_or("–".to_owned(), |r| format!("{r:.2}×"));
            let _ok = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    text
}

/// Bars for each figure, as shares of the longest.
fn plot(contenders: &[Contender], results: &Results) -> String {
    const WIDTH: f64 = 900.0;
    const LEFT: f64 = 110.0;
    const BAR: f64 = 14.0;
    let shown_figures: Vec<&Figure> = FIGURES
        .iter()
        .filter(|figure| contenders.iter().any(|c| !results.of(figure, *c).is_empty()))
        .collect();
    let mut body = String::new();
    let mut y = 20.0;
    for figure in shown_figures {
        let better = if figure.more { "more is better" } else { "less is better" };
        let _ok = write!(
            body,
            "<text x='0' y='{y}' class='title'>{} ({}, {better})</text>",
            figure.name, figure.unit
        );
        y += 8.0;
        let medians: Vec<(Contender, f64)> = contenders
            .iter()
            .filter_map(|contender| Some((*contender, median(results.of(figure, *contender))?)))
            .collect();
        let longest = medians.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        for (contender, value) in medians {
            let length = (WIDTH - LEFT - 90.0) * (value / longest).max(0.0);
            let class = if contender == Contender::Hauberk { "own" } else { "other" };
            let _ok = write!(
                body,
                "<text x='{:.0}' y='{:.0}' text-anchor='end'>{}</text>\
                 <rect x='{LEFT}' y='{y:.0}' width='{length:.1}' height='{:.0}' class='{class}'/>\
                 <text x='{:.1}' y='{:.0}'>{}</text>",
                LEFT - 6.0,
                y + BAR - 3.0,
                contender.name(),
                BAR - 2.0,
                LEFT + length + 5.0,
                y + BAR - 3.0,
                shown(value)
            );
            y += BAR;
        }
        y += 24.0;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {y:.0}' \
         font-family='sans-serif' font-size='11'><style>.title{{font-weight:bold}}\
         .own{{fill:#1b6ca8}}.other{{fill:#b9c4cc}}</style>\
         <rect width='100%' height='100%' fill='white'/>{body}</svg>\n"
    )
}
