//! The report as HTML: pieces, style, and how numbers are written.
//!
//! Every piece is well-formed XML, too, so that a test can tell.

use super::plot::PALETTE;
use plotters::style::RGBColor;
use std::fmt::Write as _;

/// What a page looks like, but for the plots' dark shades.
const STYLE: &str = include_str!("style.css");

/// Text between tags or in an attribute.
pub(super) fn text(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// `29,982`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// `7,288`, `10 k`, `95.8 M`: as much as fits at a plot.
pub(super) fn short(number: u64) -> String {
    let (unit, word) = match number {
        0..10_000 if number == 0 || !number.is_multiple_of(1_000) => return grouped(number),
        0..1_000_000 => (1_000, "k"),
        1_000_000..1_000_000_000 => (1_000_000, "M"),
        _ => (1_000_000_000, "G"),
    };
    match (number / unit, number % unit * 10 / unit) {
        (whole, 0) => format!("{whole} {word}"),
        (whole, tenth) => format!("{whole}.{tenth} {word}"),
    }
}

/// How many times as much, to two digits or so.
pub(super) fn times(more: u64, less: u64) -> String {
    let ratio = more as f64 / less.max(1) as f64;
    if ratio < 10.0 {
        format!("{ratio:.1} ×")
    } else {
        format!("{} ×", grouped(format!("{ratio:.0}").parse().unwrap_or(0)))
    }
}

/// Seconds since 1970 as a date and a time of day, UTC.
pub(super) fn date(seconds: u64) -> String {
    // Days are counted from 1 March of year 0, so that a leap day is a year's last.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600 % 24, seconds / 60 % 60)
}

/// A table: its columns if they have names, of which those after the first are numbers, and rows of pieces.
pub(super) fn table(columns: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = "<div class=\"wide\"><table>\n".to_owned();
    if !columns.is_empty() {
        let names: Vec<String> = columns.iter().map(|name| format!("<th>{}</th>", text(name))).collect();
        let _ = writeln!(out, "<thead><tr>{}</tr></thead>", names.concat());
    }
    out += "<tbody>\n";
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        let _ = writeln!(out, "<tr>{}</tr>", cells.concat());
    }
    out + "</tbody></table></div>\n"
}

/// A section with a heading, what it says first, and the rest.
pub(super) fn section(heading: &str, lead: &str, rest: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n<p>{}</p>\n{rest}</section>\n", text(heading), text(lead))
}

/// The whole page.
pub(super) fn whole(title: &str, body: &str) -> String {
    let mut style = STYLE.to_owned();
    style += "@media (prefers-color-scheme: dark) {\n";
    for (RGBColor(r, g, b), dark) in PALETTE {
        let light = format!("#{r:02X}{g:02X}{b:02X}");
        let _ = writeln!(
            style,
            "  [fill=\"{light}\"] {{ fill: {dark}; }} [stroke=\"{light}\"] {{ stroke: {dark}; }}"
        );
    }
    style += "}\n";
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{}</title>\n<style>\n{style}</style>\n\
         </head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        text(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        let written = [0, 999, 7288, 29_982, 95_800_000].map(grouped);
        assert_eq!(written, ["0", "999", "7,288", "29,982", "95,800,000"]);
        let written = [7288, 10_000, 95_800_000, 3_000_000_000].map(short);
        assert_eq!((short(0), short(1_000)), ("0".to_owned(), "1 k".to_owned()));
        assert_eq!(written, ["7,288", "10 k", "95.8 M", "3 G"]);
        assert_eq!(
            (times(1298, 129), times(810_000, 7288), times(3387, 1500)),
            ("10 ×".into(), "111 ×".into(), "2.3 ×".into())
        );
    }

    #[test]
    fn a_date_is_that_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_823_999), "2026-11-27 23:59 UTC");
    }
}
