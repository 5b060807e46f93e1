"use strict";
// What every page does by itself: parts that are looked at again, keys, the theme, questions before a change. Pages work without
// it, but for what moves.

(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const toast = document.getElementById("toast");

  // ---- parts that are looked at again: not while nobody looks, and ever less often while the server is away ----

  const SLOWEST_MS = 60000;

  function follow(element) {
    const every = Number(element.dataset.every) * 1000;
    let pause = every;
    let timer = 0;
    const again = () => {
      clearTimeout(timer);
      if (!document.hidden && element.isConnected) htmx.trigger(element, "again");
    };
    const later = () => { clearTimeout(timer); timer = setTimeout(again, pause); };
    element.addEventListener("htmx:afterRequest", (event) => {
      if (event.target !== element) return;
      pause = event.detail.successful ? every : Math.min(SLOWEST_MS, pause * 2);
      if (!event.detail.successful) say(toast.dataset.lost);
      later();
    });
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : again()));
    if (!document.hidden) later();
  }

  document.addEventListener("htmx:configRequest", (event) => {
    const seen = event.target.dataset.seen;
    if (seen) event.detail.headers["X-Seen"] = seen;
  });

  // What somebody has opened, marked or typed stays so.
  const isBeingTyped = (each) => each === document.activeElement || (each.defaultValue !== undefined && each.value !== each.defaultValue);
  let opened = [];
  document.addEventListener("htmx:beforeSwap", (event) => {
    const target = event.detail.target;
    const selection = document.getSelection();
    const marked = selection && !selection.isCollapsed && target.contains(selection.anchorNode);
    if (marked || all("input:not([type=hidden]), select, textarea", target).some(isBeingTyped)) {
      event.detail.shouldSwap = false;
      return;
    }
    opened = all("details", target).map((each) => each.open);
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    event.detail.target.dataset.seen = event.detail.xhr.getResponseHeader("X-Part") ?? "";
    all("details", event.detail.target).forEach((each, index) => { each.open = opened[index] ?? each.open; });
    showMoments(event.detail.target);
  });

  // ---- moments, in the reader's own zone ----

  // The browser's own, where it is of the page's language: en-GB writes dates another way than en-US.
  const locale = navigator.languages.find((each) => each.startsWith(document.documentElement.lang)) ?? document.documentElement.lang;

  function showMoments(within) {
    for (const each of all("time[data-moment]", within)) {
      each.title = each.textContent;
      each.textContent = new Date(each.dateTime).toLocaleString(locale, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
    }
  }

  // ---- forms ----

  const ask = document.getElementById("ask");
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.dataset.ask || form.dataset.answered) return;
    event.preventDefault();
    document.getElementById("ask-what").textContent = form.dataset.ask;
    ask.returnValue = "no";
    ask.showModal();
    ask.addEventListener("close", () => {
      if (ask.returnValue !== "yes") return;
      form.dataset.answered = "yes";
      form.requestSubmit();
    }, { once: true });
  });
  document.addEventListener("formdata", (event) => {
    if (event.target.method !== "get") return;
    for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
  });
  for (const form of all("form[data-at-once]")) {
    form.addEventListener("change", (event) => { if (event.target.matches("select")) form.requestSubmit(); });
  }

  // ---- theme ----

  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function switchTheme() {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    const secure = location.protocol === "https:" ? "; Secure" : "";
    document.cookie = `agentflow_theme=${theme}; Path=/dashboard; Max-Age=31536000; SameSite=Strict${secure}`;
    document.dispatchEvent(new Event("theme"));
  }
  all("[data-theme-switch]").forEach((each) => each.addEventListener("click", switchTheme));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));

  // ---- keys ----

  const help = document.getElementById("keys");
  const showHelp = () => help && !help.open && help.showModal();
  all("[data-help]").forEach((each) => each.addEventListener("click", showHelp));

  function step(by) {
    const rows = all("[data-row]");
    if (!rows.length) return;
    const at = rows.indexOf(document.activeElement);
    rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + by))].focus();
  }
  let going = false;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (going) {
      going = false;
      const link = document.querySelector(`[data-go="${CSS.escape(event.key)}"]`);
      if (link) { event.preventDefault(); link.click(); }
      return;
    }
    if (event.key === "g") { going = true; setTimeout(() => { going = false; }, 1500); }
    else if (event.key === "/") { const search = document.querySelector("[data-search]"); if (search) { event.preventDefault(); search.focus(); search.select(); } }
    else if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "t") switchTheme();
    else if (event.key === "?") showHelp();
  });

  // ---- copying ----

  function say(text) { toast.textContent = ""; setTimeout(() => { toast.textContent = text; }, 50); }
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        const before = button.lastChild.textContent;
        button.lastChild.textContent = toast.dataset.copied;
        setTimeout(() => { button.lastChild.textContent = before; }, 1500);
        say(toast.dataset.copied);
      } catch {
        getSelection().selectAllChildren(source); // not over http: it is marked, and Ctrl-C does the rest
      }
    });
  }

  showMoments(document);
  all("[data-every]").forEach(follow);
})();
